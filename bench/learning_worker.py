"""Runs one side of bench/learning.py on one set: `python bench/learning_worker.py MODULE SIDE FILE`, commands on stdin.

MODULE has `fit(side, data, seed, **settings)`, which returns a function from (indices, values) to scores, that of the
best epoch, the validation logloss of each epoch, and the seconds of each.
"""

import functools
import importlib
import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print must not get between the answers


def main():
    from learning import Data, auc, logloss

    side, data = sys.argv[2], Data.load(sys.argv[3])

    @functools.cache  # what was tried is not trained again once it is chosen
    def fitted(seed, settings):
        return importlib.import_module(sys.argv[1]).fit(side, data, seed, **dict(settings))

    for line in sys.stdin:
        command = json.loads(line)
        try:
            predict, losses, seconds = fitted(command["seed"], tuple(sorted(command["settings"].items())))
            inputs, labels = data.of("validation")
            reply = {"validation": logloss(labels, predict(*inputs))}
            if command["test"]:
                inputs, labels = data.of("test")
                scores = predict(*inputs)
                reply |= {"auc": auc(labels, scores), "logloss": logloss(labels, scores)}
                reply |= {"seed": command["seed"], "losses": losses, "seconds": seconds}
        except Exception as error:  # the bench goes on without this side, and says why
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
