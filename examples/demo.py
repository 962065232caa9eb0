"""`make demo`: train on real data with 2 workers, predict, and prove the numbers.

python examples/demo.py
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
JOB = HERE / "digits.py"
PLAN = "data(2)"


def allfuse(*arguments: str) -> None:
    """Run a command as a person would, and show it."""
    print(f"\n$ allfuse {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "allfuse", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def write_held_out_rows(path: Path) -> list[int]:
    """The test rows as a table without their labels, which are returned."""
    sys.path.insert(0, str(HERE))
    import digits

    pixels, labels = digits.split()[2]
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([f"pixel_{i}" for i in range(64)])
        rows.writerows([f"{value:g}" for value in row] for row in pixels.tolist())
    return [int(label) for label in labels]


def main() -> None:
    begin = time.monotonic()
    folder = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    rows, labels = folder / "rows.csv", folder / "labels.csv"
    allfuse("train", str(JOB), "--plan", PLAN, "--out", str(folder))
    truth = write_held_out_rows(rows)
    options = ("--input", str(rows), "--output", str(labels), "--workers", "2")
    allfuse("predict", str(folder), *options)
    with labels.open(newline="") as file:
        found = [int(row["prediction"]) for row in csv.DictReader(file)]
    right = sum(a == b for a, b in zip(found, truth, strict=True))
    print(f"{right} of {len(truth)} held-out digits are right: accuracy {right / len(truth):.4f}")
    allfuse("verify", str(JOB), "--plan", PLAN)
    record = json.loads((folder / "run.json").read_text())
    print(f"\nEverything of this run is in {folder} (job, events, checkpoints, model.safetensors);")
    print(f"it was trained by torch {record['versions']['torch']} under {record['plan']}.")
    print(f"The demo took {time.monotonic() - begin:.0f} s.")
    if right / len(truth) < 0.95:
        sys.exit("the accuracy is below 0.95")


if __name__ == "__main__":
    main()
