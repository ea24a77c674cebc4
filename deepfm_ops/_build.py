"""Compiles csrc/. setup.py runs this file without the package; _library.py compiles an op left to its first use."""

import concurrent.futures
import glob
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import typing

# setup.py has no package to import it from.
replacing = runpy.run_path(str(pathlib.Path(__file__).with_name("files.py")))["replacing"]
FLAGS = {  # one body of the loops, one build per instruction set
    "fm_cpu_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "fm_cpu_avx512.cc": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
ARCHITECTURES = "80 90"  # of GPUs; for those that come later there is PTX of the last
CUDA_ROOTS = ("/usr/local/cuda", "/usr/local/cuda-12*")
DESCRIBE = """
import json
import tensorflow as tf
print(json.dumps([tf.__version__, tf.sysconfig.get_compile_flags(), tf.sysconfig.get_link_flags()]))
"""


class Cuda(typing.NamedTuple):
    """The kernels for GPUs: what linking them takes, and what is to be known of them."""

    objects: list
    flags: list
    architectures: list
    runtime: str | None  # the CUDA they were built with; None: they are emulated, and need no driver


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


def run(arguments, program=None):
    """Runs the compiler, or another program.

    Raises:
        RuntimeError: it failed; the text holds the first error it printed.

    """
    command = [*(compiler() if program is None else [program]), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else f"status {done.returncode}")
        raise RuntimeError(f"{command[0]} failed: {first}")
    return done.stderr


def compile_folder(folder, objects, flags=(), suffix=".cc", program=None):
    """The objects of a folder's sources; those that are newer than their source and all headers are kept."""
    headers = [path for path in folder.parent.glob("**/*") if path.suffix in (".h", ".cuh")]
    newest = max(path.stat().st_mtime for path in [*headers, pathlib.Path(__file__)])
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = objects / (source.stem + ".o")
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            options = ["-fPIC", "-Wall"] if program is None else []
            options += ["-std=c++17", "-O3", *FLAGS.get(source.name, []), *flags]
            return target, run([*options, "-c", source, "-o", target], program)
        return target, ""

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_one, sorted(folder.glob(f"*{suffix}"))))
    print("".join(warnings for _, warnings in done), end="", file=sys.stderr)
    return [target for target, _ in done]


def find_nvcc():
    """(nvcc, version such as "12.5", flags that link what it makes) of the CUDA compiler to use, or None.

    It is looked for on PATH, in CUDA_HOME and below /usr/local. Of several, one of CUDA 12 is taken: its programs run
    with the drivers that TensorFlow's GPU wheels run with, and with newer ones.
    """
    roots = [os.environ.get("CUDA_HOME", ""), *(path for root in CUDA_ROOTS for path in sorted(glob.glob(root)))]
    paths = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{root}/bin") for root in roots if root)]
    found = []
    for path in filter(None, paths):
        done = subprocess.run([path, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, errors="replace")
        version = re.search(r"__CUDACC_VER_MAJOR__=(\d+) .*__CUDACC_VER_MINOR__=(\d+)", done.stderr)
        libraries = re.search(r"LIBRARIES=(.*)", done.stderr)
        if version and libraries:
            found.append((path, f"{version[1]}.{version[2]}", shlex.split(libraries[1])))
    return min(found, key=lambda nvcc: not nvcc[1].startswith("12."), default=None)


def build_cuda(source, build):
    """Compiles the kernels for GPUs, where that is asked for.

    DEEPFM_OPS_CUDA=auto    if there is an nvcc and it succeeds; else says in a line why not (default)
    DEEPFM_OPS_CUDA=1       or fail
    DEEPFM_OPS_CUDA=0       do not

    Args:
        source: the folder csrc/cuda.
        build: the folder that a folder for the objects is made in.

    Returns:
        `Cuda`, or None.

    Raises:
        RuntimeError: they were asked for and cannot be had; a variable is not what it may be.

    """
    mode = os.environ.get("DEEPFM_OPS_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise RuntimeError(f"DEEPFM_OPS_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return None
    given = os.environ.get("DEEPFM_OPS_CUDA_ARCHITECTURES", ARCHITECTURES)
    architectures = sorted(given.split(), key=lambda name: (len(name), name))
    if not architectures or not all(re.fullmatch("[0-9]{2,3}", name) for name in architectures):
        text = "DEEPFM_OPS_CUDA_ARCHITECTURES must be numbers of two or three digits"
        raise RuntimeError(f"{text}, such as {ARCHITECTURES!r}, got {given!r}")
    try:
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        program, runtime, libraries = nvcc
        flags = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Werror", "all-warnings", "--threads", "0"]
        for name in architectures:
            flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        flags += ["-gencode", f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
        objects = build / "-".join(["cuda", runtime, *architectures])
        compiled = compile_folder(source, objects, flags, ".cu", program)
    except RuntimeError as error:
        if mode == "1":
            raise RuntimeError(f"DEEPFM_OPS_CUDA=1, but {error}") from None
        print(f"deepfm_ops: no kernels for GPUs: {error}", file=sys.stderr)
        return None
    static = [*libraries, "-Wl,--exclude-libs,ALL", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return Cuda(compiled, static, architectures, runtime)


def link(library, arguments):
    library.parent.mkdir(parents=True, exist_ok=True)
    with replacing(library) as fresh:
        run(["-shared", "-o", fresh, *arguments])


def build_op(source, kernels, objects, library, tensorflow, cuda=None):
    """Compiles the TensorFlow ops and links them.

    Args:
        source: the folder csrc/tf, with csrc/kernels beside it.
        kernels: the kernels' objects.
        objects: the folder for those of the ops.
        library: the file to write.
        tensorflow: what find_tensorflow gives.
        cuda: `Cuda`; None: the ops get no kernels for GPUs.

    Returns:
        What _build_info.json is to hold.

    Raises:
        RuntimeError: the compiler failed.

    """
    version, compile_flags, link_flags = tensorflow
    # What TensorFlow deprecates in one series may have no other name in the one before.
    flags = ["-Wno-deprecated-declarations", *(flag.replace("-I", "-isystem") for flag in compile_flags)]
    compiled = [*compile_folder(source, objects, flags), *kernels]
    if cuda is not None:
        compiled += [*compile_folder(source / "gpu", objects / "gpu", flags), *cuda.objects, *cuda.flags]
    link(library, ["-Wl,-z,defs", *compiled, *link_flags])
    line = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    return {"tensorflow": version, "compiler": line, **describe(cuda)}


def describe(cuda):
    """What _build_info.json is to hold of the kernels for GPUs."""
    return {
        "cuda_architectures": cuda.architectures if cuda else [],
        "cuda_runtime": cuda.runtime if cuda else None,
    }


def carry(csrc, kernels, folder):
    """Puts what build_op needs into `folder`, but for CUDA: ops' sources, kernels' headers, their objects as one."""
    shutil.copytree(csrc / "tf", folder / "tf", ignore=shutil.ignore_patterns("gpu"))
    shutil.copytree(csrc / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("*.cc"))
    run(["-r", "-nostdlib", "-o", folder / "kernels.o", *kernels])
