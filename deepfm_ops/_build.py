"""Compiles csrc/. setup.py runs this file without the package; _library.py compiles an op left to its first use."""

import concurrent.futures
import json
import os
import pathlib
import runpy
import shlex
import shutil
import subprocess
import sys

# setup.py has no package to import it from.
replacing = runpy.run_path(str(pathlib.Path(__file__).with_name("files.py")))["replacing"]
FLAGS = {  # one body of the loops, one build per instruction set
    "fm_cpu_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "fm_cpu_avx512.cc": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
DESCRIBE = """
import json
import tensorflow as tf
print(json.dumps([tf.__version__, tf.sysconfig.get_compile_flags(), tf.sysconfig.get_link_flags()]))
"""


def compiler():
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def has_compiler():
    return shutil.which(compiler()[0]) is not None


def find_tensorflow():
    """[version, compile flags, link flags] of the TensorFlow that this interpreter's environment has, or None.

    A process of its own asks it. pip's build isolation hides the environment by way of PYTHONPATH: -E looks past it.
    """
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    for options in ([], ["-E"]):
        done = subprocess.run([sys.executable, *options, "-c", DESCRIBE], capture_output=True, text=True, env=env)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    return None


def run(arguments):
    """Runs the compiler.

    Raises:
        RuntimeError: it failed; the text holds the first error it printed.

    """
    command = [*compiler(), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else f"status {done.returncode}")
        raise RuntimeError(f"{command[0]} failed: {first}")
    return done.stderr


def compile_folder(folder, objects, flags=()):
    """The objects of a folder's sources; those that are newer than their source and all headers are kept."""
    headers = max(path.stat().st_mtime for path in [*folder.parent.glob("**/*.h"), pathlib.Path(__file__)])
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = objects / (source.stem + ".o")
        if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
            options = ["-std=c++17", "-O3", "-fPIC", "-Wall", *FLAGS.get(source.name, []), *flags]
            return target, run([*options, "-c", source, "-o", target])
        return target, ""

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_one, sorted(folder.glob("*.cc"))))
    print("".join(warnings for _, warnings in done), end="", file=sys.stderr)
    return [target for target, _ in done]


def link(library, arguments):
    library.parent.mkdir(parents=True, exist_ok=True)
    with replacing(library) as fresh:
        run(["-shared", "-o", fresh, *arguments])


def build_op(source, kernels, objects, library, tensorflow):
    """Compiles the TensorFlow ops and links them.

    Args:
        source: the folder csrc/tf, with csrc/kernels beside it.
        kernels: the kernels' objects.
        objects: the folder for those of the ops.
        library: the file to write.
        tensorflow: what find_tensorflow gives.

    Returns:
        What _build_info.json is to hold.

    Raises:
        RuntimeError: the compiler failed.

    """
    version, compile_flags, link_flags = tensorflow
    # What TensorFlow deprecates in one series may have no other name in the one before.
    flags = ["-Wno-deprecated-declarations", *(flag.replace("-I", "-isystem") for flag in compile_flags)]
    link(library, ["-Wl,-z,defs", *compile_folder(source, objects, flags), *kernels, *link_flags])
    line = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    return {"tensorflow": version, "compiler": line, "cuda_architectures": []}


def carry(csrc, kernels, folder):
    """Puts what build_op needs into `folder`: the ops' sources, the kernels' headers, and their objects as one."""
    shutil.copytree(csrc / "tf", folder / "tf")
    shutil.copytree(csrc / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("*.cc"))
    run(["-r", "-nostdlib", "-o", folder / "kernels.o", *kernels])
