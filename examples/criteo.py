"""From a click log in files to a model that serves and follows the next day: what `make demo-logs` runs.

python examples/criteo.py [--rows N] [--folder FOLDER]           makes a log of Criteo's form, whose true model is known
python examples/criteo.py PATH... [--valid PATH...] [--folder FOLDER]        reads files: plain, compressed, or Parquet

A PATH is a file, a glob or a folder, in Criteo's form or with its columns (label, I1 to I13, C1 to C26) by name; the
last file is what is validated on, unless --valid names others. FOLDER gets all that is made. Training that was
interrupted goes on from its newest checkpoint when the same command is given again. Every step is a process of its own,
so that the memory it says is its own.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a request is too short to be shared out

import numpy as np
from pyarrow import parquet

from deepfm_ops import FeatureDictionary, data
from deepfm_ops.data.synthetic import ClickLog, auc

# The days of the log that is made: learned; validated on, and learned afterwards; a test only.
TRAINING_DAYS, LAST_DAY, NEXT_DAY = range(6), 6, 7
DAYS, FILES_PER_DAY = NEXT_DAY + 1, 2
SPAWN = multiprocessing.get_context("spawn")


def megabytes():
    """The most memory of this process; what the system says besides holds what its parent had when it was started."""
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def report(start, rows=None):
    """Prints how long something took, and the memory that this process needed at most so far."""
    seconds = time.perf_counter() - start
    speed = f", {rows / seconds:,.0f} rows/s" if rows else ""
    print(f"   {seconds:.1f} s{speed}, at most {megabytes():,.0f} MB", flush=True)


def run(step, *arguments, kill_when=None):
    """Runs a step in a process of its own; returns whether it was killed, because kill_when() became true."""
    process = SPAWN.Process(target=step, args=arguments, daemon=True)
    process.start()
    while process.is_alive():
        if kill_when is not None and kill_when():
            process.kill()  # SIGKILL: nothing in the process can prepare for it
            process.join()
            return True
        process.join(0.01 if kill_when else None)
    if process.exitcode:
        sys.exit(f"{step.__name__} failed")
    return False


def files_of(folder, days=range(DAYS)):
    return [file for day in days for file in sorted(folder.glob(f"day-{day:02}-part-*.tsv"))]


def make_log(folder, rows):
    """Writes the log, unless it is there."""
    start, note, wanted = time.perf_counter(), folder / "log.json", {"rows": rows, "files": DAYS * FILES_PER_DAY}
    is_there = note.exists() and json.loads(note.read_text()) == wanted and len(files_of(folder)) == wanted["files"]
    print(f"1. {'Found' if is_there else 'Making'} a log of {rows:,} rows in {DAYS} days: {folder}", flush=True)
    if not is_there:
        note.unlink(missing_ok=True)
        ClickLog().write(folder, range(DAYS), rows // DAYS, FILES_PER_DAY, format="tsv")
        note.write_text(json.dumps(wanted))  # at the end: where it is, all files were written
        report(start, rows)


def count(files, folder, min_count):
    """One pass that finds the values that get a row of the table, and how often each occurs."""
    print(f"2. Counting in {names(files)}", flush=True)
    start = time.perf_counter()
    features = FeatureDictionary(min_count=min_count)
    numeric = dict.fromkeys(ClickLog.numeric, "log1p")
    features.fit(files, numeric=numeric, categorical=ClickLog.categorical, label="label")
    features.save(folder / "features")
    print(f"   {features.num_features:,} features; a value that occurs less than {min_count} times has none of its own")
    report(start, features.num_samples)


def train(files, valid, folder, batch_size, log, rows):
    """A pass over the files from the newest checkpoint on, whose place in it others see in `rows`; and validation."""
    # TensorFlow is imported here: what counts and what serves does without.
    import keras

    from deepfm_ops import Checkpoint, DeepFM

    class Progress(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            where = f"goes on after row {stream.rows:,}" if stream.rows else "starts"
            print(f"   process {os.getpid()} {where}", flush=True)

        def on_train_batch_end(self, batch, logs=None):
            rows.value = stream.rows
            if stream.batch and stream.batch % every_steps == 0:
                speed, loss = logs["rows_per_second"], logs["loss"]
                print(f"   {stream.rows:12,} rows, {speed:,.0f} rows/s, loss {loss:.4f}", flush=True)

    start = time.perf_counter()
    keras.utils.set_random_seed(0)
    features = FeatureDictionary.load(folder / "features")
    model = DeepFM.from_features(features, seed=0)
    model.compile()  # the recommended optimizers, learning rates and averages
    stream = features.stream(files, batch_size, shuffle="rows")  # days stay in their order
    every_steps = max(1, features.num_samples // batch_size // 12)  # a dozen checkpoints in a pass
    checkpoint = Checkpoint(folder / "checkpoints", every_steps=every_steps)
    model.fit(stream, verbose=0, callbacks=[Progress(), checkpoint])
    if checkpoint.epoch:
        print("   was done before", flush=True)
    report(start)

    print(f"4. Validating on {names(valid)}", flush=True)
    start = time.perf_counter()
    found, logloss, size = evaluate(model, valid)
    print(f"   AUC {found:.4f}, logloss {logloss:.4f}", flush=True)
    if log is not None:
        best, learned = (log.ceiling(LAST_DAY, size, model_day=day) for day in (LAST_DAY, TRAINING_DAYS[-1]))
        print(f"   the true model has an AUC of {best:.4f}, that of the day before {learned:.4f}", flush=True)
    report(start, size)
    store(model, folder)


def evaluate(model, files):
    """(AUC, logloss, rows) of a model on files."""
    labels, scores = [], []
    for inputs, some in model.features.stream(files, 8192):
        labels.append(some)
        scores.append(model.predict_on_batch(inputs)[:, 0])
    labels, scores = np.concatenate(labels), np.clip(np.concatenate(scores).astype(np.float64), 1e-7, 1 - 1e-7)
    return auc(labels, scores), -np.mean(np.log(np.where(labels == 1, scores, 1 - scores))), len(labels)


def store(model, folder):
    """For those who train on, and for those who serve."""
    from deepfm_ops import export_scorer

    start, path = time.perf_counter(), folder / "model.scorer"
    model.save(folder / "model.keras")
    export_scorer(model, path)
    print(f"   saved, and exported: {path}, {path.stat().st_size / 1e6:,.0f} MB", flush=True)
    report(start)


def follow(files, test, folder, batch_size, log):
    """Another day: its new values get rows, and the model goes on learning."""
    import keras

    print(f"5. Learning {names(files)} too; a test is {names(test)}", flush=True)
    start = time.perf_counter()
    model = keras.models.load_model(folder / "model.keras")
    before, _, rows = evaluate(model, test)
    features = FeatureDictionary.load(folder / "features")
    known, seen = features.num_features, features.num_samples
    features.update(files)
    features.save(folder / "features")
    model.resize(features)
    print(f"   {features.num_features - known:,} new features, {features.num_features:,} now", flush=True)
    model.fit(features.stream(files, batch_size, shuffle="rows"), verbose=0)
    after, best = evaluate(model, test)[0], log.ceiling(NEXT_DAY, rows)
    print(f"   AUC of the test: {before:.4f} before, {after:.4f} now, {best:.4f} of the true model", flush=True)
    report(start, features.num_samples - seen)
    store(model, folder)


def serve(folder, file):
    """Scores the first record of a file as a server does: raw values, one at a time, without TensorFlow."""
    from deepfm_ops.scorer import Scorer

    scorer, record = Scorer.load(folder / "model.scorer"), first_record(file)
    label = record.pop("label")
    print(f"6. A request: {json.dumps(record)[:100]} ...", flush=True)
    start, requests = time.perf_counter(), 2000
    for _ in range(requests):
        score = scorer.score(record)[0]
    each = (time.perf_counter() - start) / requests
    print(f"   score {score:.4f} (the label was {label:.0f}), {each * 1e6:.0f} us a request", flush=True)
    report(start)


def first_record(file):
    """The first record of a file, as a dict of plain values; None is missing."""
    files = data.files(file)
    if files.is_parquet:
        return next(parquet.ParquetFile(file).iter_batches(1)).to_pylist()[0]
    with io.TextIOWrapper(files.stream(files.paths[0]), encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter=files.delimiter)
        columns, cells = data.CRITEO, next(rows)
        if "label" in cells:
            columns, cells = cells, next(rows)
    record = dict(zip(columns, cells, strict=True))
    return {name: None if cell == "" else cell if name[0] == "C" else float(cell) for name, cell in record.items()}


def names(files):
    return f"{files[0].name} and {len(files) - 1} more" if len(files) > 1 else files[0].name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files to learn; none: a log is made")
    parser.add_argument("--valid", nargs="+", metavar="PATH", help="files to validate on; default: the last one")
    parser.add_argument("--folder", type=pathlib.Path, help="default: demo-output/logs, or demo-output/criteo")
    parser.add_argument("--min-count", type=int, default=10, help="a value needs as many for a row of its own")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the log that is made")
    choices = parser.parse_args()
    start, log = time.perf_counter(), None
    folder = choices.folder or pathlib.Path("demo-output", "criteo" if choices.paths else "logs")
    folder.mkdir(parents=True, exist_ok=True)
    if choices.paths:
        files = [pathlib.Path(path) for path in data.files(choices.paths).paths]
        valid = [pathlib.Path(path) for path in data.files(choices.valid or files.pop()).paths]
        if not files:
            parser.error("one file to learn, and none to validate on: name one with --valid")
    else:
        log = ClickLog()
        run(make_log, folder, choices.rows)
        files, valid, test = (files_of(folder, days) for days in (TRAINING_DAYS, [LAST_DAY], [NEXT_DAY]))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of an earlier run: all is shown again

    run(count, files, folder, choices.min_count)
    print(f"3. Training on {names(files)}", flush=True)
    rows = SPAWN.Value("q", lock=False)  # a killed process could not give a lock back
    training = (files, valid, folder, choices.batch_size, log, rows)
    kill_at = float("inf") if log is None else choices.rows * len(TRAINING_DAYS) / DAYS * 0.65
    if run(train, *training, kill_when=lambda: rows.value > kill_at):
        print(f"   killed after row {rows.value:,}. The same again:", flush=True)
        run(train, *training)
    if log is not None:
        run(follow, valid, test[:1], folder, choices.batch_size, log)
    run(serve, folder, valid[0])
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 + megabytes()
    print(f"All: {(time.perf_counter() - start) / 60:.1f} minutes, at most {most:,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
