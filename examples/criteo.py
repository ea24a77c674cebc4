"""From a click log in files to a model that serves and follows the next day: what `make demo-logs` runs.

python examples/criteo.py [--rows N] [--folder FOLDER]         makes a log of Criteo's form, whose true model is known
python examples/criteo.py PATH... [--valid PATH...] [--folder FOLDER]      takes files: plain, .gz, .zst, .bz2, Parquet

PATH is a file, a glob or a folder, in Criteo's form or with its columns (label, I1 to I13, C1 to C26) by name; the last
file is what is validated on, unless --valid says which. What was counted and trained stays in FOLDER: after a crash, the
same command goes on from there. Every step is a process of its own, whose peak of memory is then the step's.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from deepfm_ops import FeatureDictionary, data
from deepfm_ops.data.synthetic import ClickLog, auc

# Of the log that is made: trained on, validated on and later learned too, never learned.
TRAINING_DAYS, LAST_DAY, NEXT_DAY = range(6), 6, 7
DAYS, FILES_PER_DAY = NEXT_DAY + 1, 2


def megabytes(who):
    return resource.getrusage(who).ru_maxrss / 1024


def report(start, rows=None):
    """Prints what a step took, and this process's peak of memory."""
    seconds = time.perf_counter() - start
    speed = f", {rows / seconds:,.0f} rows/s" if rows else ""
    print(f"   {seconds:.1f} s{speed}, peak memory {megabytes(resource.RUSAGE_SELF):,.0f} MB", flush=True)


def run(step, *arguments, kill_when=None):
    """Runs a step in a process of its own; returns whether it was killed, as soon as kill_when() was true."""
    process = multiprocessing.get_context("spawn").Process(target=step, args=arguments, daemon=True)
    process.start()
    while process.is_alive():
        if kill_when is not None and kill_when():
            process.kill()  # SIGKILL: nothing in the process can prepare for it
            process.join()
            return True
        process.join(0.05)
    if process.exitcode:
        sys.exit(process.exitcode)
    return False


def make_log(folder, rows, seed):
    """Writes the log, unless it is there."""
    start, note = time.perf_counter(), folder / "log.json"
    made = {"rows": rows, "seed": seed, "days": DAYS, "files_per_day": FILES_PER_DAY}
    if note.exists() and json.loads(note.read_text()) == made:
        print(f"1. The log of {rows:,} rows is in {folder}", flush=True)
        return
    print(f"1. Making a log of {rows:,} rows, {DAYS} days in {FILES_PER_DAY} files each, in {folder}", flush=True)
    note.unlink(missing_ok=True)
    ClickLog(seed).write(folder, range(DAYS), rows // DAYS, FILES_PER_DAY, format="tsv")
    note.write_text(json.dumps(made))  # at the end: where it is, all of the log is
    report(start, rows)


def count(files, path, min_count):
    """One pass that finds the values that get a row of the table, and how often each occurs."""
    print(f"2. Counting the values of {len(files)} files", flush=True)
    if path.exists():
        print(f"   was done before: {path}", flush=True)
        return
    start = time.perf_counter()
    features = FeatureDictionary(min_count=min_count)
    columns = {"numeric": dict.fromkeys(ClickLog.numeric, "log1p"), "categorical": ClickLog.categorical}
    features.fit(files, **columns, label="label")
    features.save(path)
    print(f"   {features.num_features:,} features, of values that occur at least {min_count} times", flush=True)
    report(start, features.num_samples)


def train(files, folder, batch_size):
    """A pass over the files, from the newest checkpoint on."""
    # TensorFlow is imported here: the steps that count and serve do without.
    import keras

    from deepfm_ops import Checkpoint, DeepFM

    class Progress(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            where = "goes on after" if stream.rows else "starts at"
            print(f"   process {os.getpid()} {where} row {stream.rows:,}", flush=True)

        def on_train_batch_end(self, batch, logs=None):
            if stream.batch and stream.batch % every_steps == 0:
                speed, loss = logs["rows_per_second"], logs["loss"]
                print(f"   {stream.rows:12,} rows, {speed:8,.0f} rows/s, loss {loss:.4f}", flush=True)

    start = time.perf_counter()
    keras.utils.set_random_seed(0)
    features = FeatureDictionary.load(folder / "features")
    model = DeepFM.from_features(features, seed=0)
    model.compile()  # without arguments: the recommended optimizers, learning rates and averages
    stream = features.stream(files, batch_size, shuffle=True)
    every_steps = checkpoint_steps(features, batch_size)
    checkpoint = Checkpoint(folder / "checkpoints", every_steps=every_steps)
    model.fit(stream, epochs=1, verbose=0, callbacks=[checkpoint, Progress()])
    model.save(folder / "model.keras")
    report(start)


def checkpoint_steps(features, batch_size):
    """Batches from one checkpoint to the next: a dozen in a pass."""
    return max(1, features.num_samples // batch_size // 12)


def is_half_done(folder, batch_size):
    """A function that says whether there is a checkpoint of half a pass or more."""
    half = FeatureDictionary.load(folder / "features").num_samples // batch_size // 2

    def found():
        names = [path.name.split("-") for path in (folder / "checkpoints").glob("epoch-*-*")]
        return any(int(batch) >= half for _, _, batch in names)

    return found


def evaluate(model, files):
    """(AUC, logloss, rows) of a model on files."""
    labels, scores = [], []
    for inputs, some in model.features.stream(files, 8192):
        labels.append(some)
        scores.append(model.predict_on_batch(inputs)[:, 0])
    labels, scores = np.concatenate(labels), np.clip(np.concatenate(scores).astype(np.float64), 1e-7, 1 - 1e-7)
    return auc(labels, scores), -np.mean(np.log(np.where(labels == 1, scores, 1 - scores))), len(labels)


def validate(files, folder, log):
    import keras

    start = time.perf_counter()
    print(f"4. Validating on {', '.join(path.name for path in files)}", flush=True)
    found, logloss, rows = evaluate(keras.models.load_model(folder / "model.keras"), files)
    print(f"   AUC {found:.4f}, logloss {logloss:.4f}", flush=True)
    if log is not None:
        best, known = (log.ceiling(LAST_DAY, rows, model_day=day) for day in (LAST_DAY, TRAINING_DAYS[-1]))
        print(f"   The true model reaches an AUC of {best:.4f}, that of the day before {known:.4f}", flush=True)
    report(start, rows)


def follow(files, test_files, folder, batch_size, log):
    """The day that was validated on is learned, too: its new values get rows, and the model goes on."""
    import keras

    start = time.perf_counter()
    print(f"5. Learning {', '.join(path.name for path in files)}; the day after that is the test", flush=True)
    model = keras.models.load_model(folder / "model.keras")
    before, _, rows = evaluate(model, test_files)
    features = FeatureDictionary.load(folder / "features")
    known, seen = features.num_features, features.num_samples
    features.update(files)
    model.resize(features)
    print(f"   {features.num_features - known:,} new features, {features.num_features:,} in all", flush=True)
    model.fit(features.stream(files, batch_size, shuffle=True), verbose=0)
    after, _, _ = evaluate(model, test_files)
    print(f"   AUC on day {NEXT_DAY}: {before:.4f} before, {after:.4f} now", flush=True)
    print(f"   The true model reaches {log.ceiling(NEXT_DAY, rows):.4f}", flush=True)
    features.save(folder / "features-next")
    model.save(folder / "model.keras")
    report(start, features.num_samples - seen)


def export(folder):
    import keras

    from deepfm_ops import export_scorer

    start, path = time.perf_counter(), folder / "model.scorer"
    export_scorer(keras.models.load_model(folder / "model.keras"), path)
    print(f"6. Exported {path}, {path.stat().st_size / 1e6:,.0f} MB", flush=True)
    report(start)


def serve(folder, file):
    """Scores the first record of a file, as a server would: raw values, one at a time, without TensorFlow."""
    from deepfm_ops.scorer import Scorer

    start = time.perf_counter()
    scorer, record = Scorer.load(folder / "model.scorer"), first_record(file)
    label = record.pop("label")
    print(f"7. A request: {json.dumps(dict(list(record.items())[:2] + list(record.items())[-2:]))[:-1]}, ...}}")
    score, rounds = scorer.score(record)[0], 2000
    began = time.perf_counter()
    for _ in range(rounds):
        scorer.score(record)
    microseconds = (time.perf_counter() - began) / rounds * 1e6
    print(f"   score {score:.4f}, the label was {label}; {microseconds:.0f} us a request", flush=True)
    report(start)


def first_record(file):
    """The first record of a file, as a dict of plain values, None where one is missing."""
    files = data.files(file)
    if files.is_parquet:
        import pyarrow.parquet

        return next(pyarrow.parquet.ParquetFile(file).iter_batches(1)).to_pylist()[0]
    with io.TextIOWrapper(files.stream(files.paths[0]), encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter=files.delimiter)
        names, cells = data.CRITEO, next(rows)
        if "label" in cells:
            names, cells = cells, next(rows)
    record = dict(zip(names, cells, strict=True))
    return {name: None if cell == "" else cell if name[0] == "C" else float(cell) for name, cell in record.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files, globs, folders; none: a log is made")
    parser.add_argument("--valid", nargs="+", help="files to validate on; default: the last one of PATH")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the log that is made")
    parser.add_argument("--folder", type=pathlib.Path, help="for all that is made; default: demo-output/logs or /criteo")
    parser.add_argument("--min-count", type=int, default=5, help="values that occur less often share a row")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the log that is made")
    choices = parser.parse_args()
    began, log = time.perf_counter(), None
    folder = choices.folder or pathlib.Path("demo-output", "criteo" if choices.paths else "logs")
    folder.mkdir(parents=True, exist_ok=True)
    if choices.paths:
        files = [pathlib.Path(path) for path in data.files(choices.paths).paths]
        if choices.valid is None and len(files) == 1:
            parser.error("one file to train on, and none to validate on: name one with --valid")
        valid = [pathlib.Path(path) for path in data.files(choices.valid).paths] if choices.valid else [files.pop()]
    else:
        for name in ("features", "checkpoints"):  # of an earlier run: this one shall show it all
            shutil.rmtree(folder / name, ignore_errors=True) if (folder / name).is_dir() else None
            (folder / name).unlink(missing_ok=True) if (folder / name).is_file() else None
        log = ClickLog(choices.seed)
        run(make_log, folder, choices.rows, choices.seed)
        days = [sorted(folder.glob(f"day-{day:02}-part-*.tsv")) for day in range(DAYS)]
        files, valid, test = [path for day in TRAINING_DAYS for path in days[day]], days[LAST_DAY], days[NEXT_DAY][:1]

    run(count, files, folder / "features", choices.min_count)
    print(f"3. Training on {len(files)} files", flush=True)
    half = None if log is None else is_half_done(folder, choices.batch_size)
    if run(train, files, folder, choices.batch_size, kill_when=half):
        print("   killed, and started again", flush=True)
        run(train, files, folder, choices.batch_size)
    run(validate, valid, folder, log)
    if log is not None:
        run(follow, valid, test, folder, choices.batch_size, log)
    run(export, folder)
    run(serve, folder, valid[0])
    peak = megabytes(resource.RUSAGE_CHILDREN) + megabytes(resource.RUSAGE_SELF)
    print(f"All in {(time.perf_counter() - began) / 60:.1f} minutes and {peak:,.0f} MB at most", flush=True)


if __name__ == "__main__":
    main()
