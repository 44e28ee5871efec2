"""Several processes share many small files, and one of them is killed twice: is every file in the results exactly once?

    python benchmarks/rehearsal.py [--files 100000] [--processes 4] [--command predict | embed | evaluate]

Tiny JPEG files are made (links to a hundred different ones, in ten class folders), torchrun starts the command, and
one process is killed without warning (SIGKILL) once some blocks of the list are done. torchrun ends the others. The
command, with --resume, goes on, is killed once more, and goes on to the end with one process fewer. The results are
then compared with the list of files, in order. The exit status is 0 if every file is there exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import deit_models
from deit_models.scoring.embeddings import load_features

ORIGINALS = 100
OUTPUTS = {"predict": "results.jsonl", "embed": "features.npz", "evaluate": "outcomes.npz"}
"""Each command's file of results."""
MODEL = "deit_micro_distilled_patch4_32"


def make_files(folder: Path, count: int) -> list[str]:
    """Files in folders named after the classes of the shipped model; their names in order."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    originals = []
    for i in range(min(ORIGINALS, count)):
        originals.append(folder.parent / f"original {i}.jpg")
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(originals[-1])
    origin = deit_models.from_pretrained(MODEL).origin
    classes = sorted(origin.class_names)
    names = []
    for i in range(count):
        inner = folder / classes[i * len(classes) // count]
        inner.mkdir(exist_ok=True)
        names.append(str(inner / f"{i:09}.jpg"))
        os.link(originals[i % len(originals)], names[-1])
    return names


def start(arguments: list[str], processes: int) -> subprocess.Popen[bytes]:
    """The command under torchrun, quiet."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "deit_models", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def children(pid: int) -> list[int]:
    """Processes that a process has started, the newest last."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return sorted(found)


def blocks(output: Path) -> int:
    """Blocks that are done."""
    return len(list(output.with_name(f"{output.name}.parts").glob("*.part")))


def run_killed(arguments: list[str], processes: int, output: Path, more: int) -> tuple[int, float]:
    """Start, kill the last process once `more` blocks are done, wait for the end; blocks done, and seconds."""
    began, before = time.perf_counter(), blocks(output)
    torchrun = start(arguments, processes)
    while blocks(output) < before + more and torchrun.poll() is None:
        time.sleep(0.05)
    if torchrun.poll() is not None:
        raise SystemExit(f"it ended before it could be killed, with status {torchrun.returncode}")
    os.kill(children(torchrun.pid)[-1], signal.SIGKILL)
    if torchrun.wait() == 0:
        raise SystemExit("torchrun did not notice that a process was killed")
    return blocks(output), time.perf_counter() - began


def names_in(output: Path) -> list[str]:
    """Names of the images in the results, in order."""
    if output.stem == "outcomes":
        with np.load(output) as rows:
            return [str(output.parent / "photos" / name) for name in rows["images"]]
    if output.suffix == ".npz":
        return list(load_features(output).paths)
    with output.open(encoding="utf-8") as lines:
        return [json.loads(line)["file"] for line in lines]


def main() -> None:
    """Run the rehearsal and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--command", choices=list(OUTPUTS), default="predict")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rehearsal") as place:
        names = make_files(Path(place) / "photos", args.files)
        output = Path(place) / OUTPUTS[args.command]
        model = [MODEL] if args.command == "evaluate" else []
        arguments = [args.command, *model, str(Path(place) / "photos")]
        arguments += ["--output", str(output), "--resume", "--offline"]
        arguments += ["--json", "--batch-size", "64"]
        for fraction in (5, 4):
            settings = output.with_name(f"{output.name}.parts") / "run.json"
            total = args.processes * 16
            if settings.exists():
                total = -(-args.files // json.loads(settings.read_text(encoding="utf-8"))["block"])
            done, seconds = run_killed(arguments, args.processes, output, max(total // fraction, 1))
            print(f"killed one of {args.processes} processes after {seconds:.0f} s; {done} blocks are done", flush=True)
        began = time.perf_counter()
        last = start(arguments, max(args.processes - 1, 1))
        if last.wait() != 0:
            raise SystemExit(f"the last run failed with status {last.returncode}")
        print(f"{max(args.processes - 1, 1)} processes finished in {time.perf_counter() - began:.0f} s")
        found = names_in(output)
        right = found == names
        print(f"{len(found)} results, {len({*found})} different, of {len(names)} files; in order: {right}")
        left = sorted(path.name for path in Path(place).iterdir() if path.name.startswith(output.name))
        print(f"files of results: {', '.join(left)}")
        raise SystemExit(0 if right and left == [output.name] else 1)


if __name__ == "__main__":
    main()
