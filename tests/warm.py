"""A process that has imported TensorFlow, and nothing of ours, and forks: see `testing.Process`.

For every line of its input, {code, arguments, folder, out, err, environment} in JSON, a child runs the code as a script
of its own; the number of the child and, once it has ended, its exit code go to the output.
"""

import gc
import json
import os
import sys
import types

import keras  # noqa: F401
import tensorflow  # noqa: F401


def prepare(folder, out, err, environment):
    """Makes of a child what a fresh process is."""
    modes = os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT
    for number, (path, mode) in enumerate(zip((os.devnull, out, err), modes, strict=True)):
        os.dup2(os.open(path, mode), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = ""


if __name__ == "__main__":
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            break
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        sys.exit()
    code, sys.argv = request.pop("code"), ["-c", *request.pop("arguments")]
    prepare(**request)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))
