"""Time what a study costs beyond its runs: overhead per run, scaling, and the planning of ten thousand runs.

    python benchmarks/study.py [--seconds 10] [--each 4] [--output benchmarks/results/study.csv]

Overhead: runs of a notebook that waits `--seconds` instead of computing, with 1, 2, 4 and 8 workers, `--each` runs for
every worker. From the beginning of the first run to the end of the last, a worker spends seconds per run; what is more
than the waiting is overhead: submitting, starting a kernel, executing the cells through papermill, saving the notebook,
checking the files. Workers that are starting are not counted, they start once for a study. For comparison, the same
runs by papermill from the command line, one after the other.

Scaling: four sweeps (phantoms of 64 pixels, one epoch) with one worker that has all cores, and with two that share them.

Planning: ten thousand runs of 04_sweep listed, checked and keyed in a new process; then how they stand, all but ten
of them done.
"""
import argparse, csv, json, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
import pandas as pd
import yaml

from cxr_noise_study import study as st
from cxr_noise_study.images import cores

COMMAND = str(Path(sys.executable).parent/"cxr-study")
CELLS = ["index: int = 0\nseconds: float = 1.\nrecords: str = ''\nruns_dir: str = ''",
         "import shutil, time\nfrom pathlib import Path",
         "time.sleep(seconds)",
         "folder = Path(runs_dir)/f'run{index}'; folder.mkdir()\nshutil.copy(records, folder)",
         "(folder/'run.json').write_text('{}')"]


def waiting_notebook(folder):
    "Write a notebook that waits."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, folder/"wait.ipynb")
    pd.DataFrame(dict(x=[1])).to_parquet(folder/"records.parquet")


def study(folder, name, workers, grid, **more):
    "Run a study; return seconds from the first beginning to the last end, and the seconds of the command."
    file = folder/f"{name}.yaml"
    file.write_text(yaml.safe_dump(dict(name=name, grids=[grid]) | more))
    start = time.perf_counter()
    subprocess.run([COMMAND, "run", str(file), "-o", str(folder/name), "-w", str(workers)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    tries = pd.DataFrame([s["attempts"][-1] for s in st.read_states(st.Output(folder/name)).values()])
    span = pd.to_datetime(tries.ended).max() - pd.to_datetime(tries.began).min()
    return span.total_seconds(), whole


def overhead(folder, seconds, each):
    "Overhead of a waiting run, in ms, by number of workers."
    waiting_notebook(folder)
    records = str(folder/"records.parquet")
    start = time.perf_counter()
    for k in range(each):
        given = dict(index=k, seconds=seconds, records=records, runs_dir=folder)
        words = [word for name, value in given.items() for word in ("-p", name, str(value))]
        subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(folder/"wait.ipynb"),
                        str(folder/"out.ipynb"), *words], check=True, stderr=subprocess.DEVNULL)
    span = time.perf_counter() - start
    yield dict(what=f"{each} runs of {seconds:g} s, papermill alone", runs=each, seconds=round(span, 2),
               overhead_ms=round(1000*(span/each - seconds)))
    for workers in (1, 2, 4, 8):
        runs = workers*each
        grid = dict(index=list(range(runs)), seconds=seconds, records=records)
        span, whole = study(folder, f"waiting{workers}", workers, grid, notebook="wait.ipynb")
        yield dict(what=f"{runs} runs of {seconds:g} s, {workers} workers", runs=runs, seconds=round(span, 2),
                   command_seconds=round(whole, 2), overhead_ms=round(1000*(span/each - seconds)))


def scaling(folder):
    "Seconds of four real runs, by number of workers."
    grid = dict(size=64, phantoms=40, epochs=1, precision="fp32", device="cpu", seed=[0, 1, 2, 3])
    for workers in (1, 2):
        span, whole = study(folder, f"real{workers}", workers, grid)
        yield dict(what=f"4 sweeps, {workers} workers", runs=4, seconds=round(span, 2), command_seconds=round(whole, 2))


def planning(folder):
    "Seconds for ten thousand planned runs."
    grid = dict(arch=["unet", "deeplabv3", "fpn", "unetplusplus", "upernet"],
                train_noise=["clean", "ladder", "0,10", "10,0"],
                task=["lungs", "heart"], size=[128, 256], seed=list(range(125)))
    file, out = folder/"many.yaml", st.Output(folder/"many")
    file.write_text(yaml.safe_dump(dict(name="many", grids=[grid])))
    plan = st.plan_study(st.read_study(file))
    attempt = dict(began=st.now(), ended=st.now(), seconds=1., peak_memory=1, kind="done")
    state = dict(status="done", kind="done", error="", rows=10, attempts=[attempt])
    (out.local/"state").mkdir(parents=True)
    for key in plan.key[:-10]: (out.local/"state"/f"{key}.json").write_text(json.dumps(state))
    for what, command in ("plan 10,000 runs, new process", "plan"), ("plan them and list how they stand", "status"):
        start = time.perf_counter()
        subprocess.run([COMMAND, command, str(file), "-o", str(folder/"many")], stdout=subprocess.DEVNULL)
        yield dict(what=what, runs=len(plan), seconds=round(time.perf_counter() - start, 2))
    start = time.perf_counter()
    st.read_states(out)
    yield dict(what="read how they stand, in process", runs=len(plan), seconds=round(time.perf_counter() - start, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--output", type=Path, help="CSV to write the table to; default: none")
    args, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as tmp:
        for part in (overhead(Path(tmp), args.seconds, args.each), scaling(Path(tmp)), planning(Path(tmp))):
            for row in part:
                rows.append(dict(cores=cores()) | row)
                more = f"   overhead {row['overhead_ms']:6d} ms a run" if "overhead_ms" in row else ""
                print(f"{row['what']:42s} {row['seconds']:8.2f} s{more}", flush=True)
    if args.output: write(args.output, rows)
    seconds = {row["what"]: row["seconds"] for row in rows}
    print(f"two workers are {seconds['4 sweeps, 1 workers']/seconds['4 sweeps, 2 workers']:.2f} times as fast as one "
          "on real runs")
    alone, one, two = (row["overhead_ms"] for row in rows[:3])
    print(f"ratio: papermill from the command line has {alone/max(one, two):.1f} times the overhead of a run of a study")


def write(path, rows):
    "Write the table as CSV."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, ["what", "cores", "runs", "seconds", "command_seconds", "overhead_ms"],
                             lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


if __name__ == "__main__": main()
