"""Time what a study costs beyond its runs: overhead per run, scaling, and the planning of ten thousand runs.

    python benchmarks/study.py [--seconds 10] [--each 4] [--output benchmarks/results/study.csv]

Overhead: runs of a notebook that waits `--seconds` instead of computing, with 1, 2, 4 and 8 workers, `--each` runs for
every worker. From the beginning of the first run to the end of the last, a worker spends seconds per run; what is more
than the waiting is overhead: handing out, starting a kernel, executing the cells through papermill, saving the notebook,
checking and moving the files. Workers that are starting are not counted, they start once for a study.
For comparison, the same runs by papermill from the command line, one after the other.

Scaling: four sweeps (phantoms of 64 pixels, one epoch) with one worker that has all cores, and with two that share them.

Planning: ten thousand runs of 04_sweep listed, checked and keyed in a new process, as `cxr-study plan` does it, all
but ten of them done; then the same again with the plan kept; then what the ledger says about all of them.
"""
import argparse, csv, json, os, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
import pandas as pd
import yaml

from cxr_noise_study import study as st
from cxr_noise_study.store import cores

CELLS = ["index: int = 0\nseconds: float = 1.\nrecords: str = ''\nruns_dir: str = ''",
         "import shutil, time\nfrom pathlib import Path",
         "time.sleep(seconds)", "folder = Path(runs_dir)/f'run{index}'; folder.mkdir()\nshutil.copy(records, folder)",
         "(folder/'run.json').write_text('{}')"]


def waiting_notebook(folder):
    "Write a notebook that waits."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, folder/"wait.ipynb")
    pd.DataFrame(dict(x=[1])).to_parquet(folder/"records.parquet")


def study(folder, name, workers, *grids, notebook=None):
    "Run a study; return seconds from the first beginning to the last end, and the seconds of the command."
    text = dict(name=name, grids=list(grids)) | ({"notebook": notebook} if notebook else {})
    file = folder/f"{name}.yaml"; file.write_text(yaml.safe_dump(text)); start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cxr_noise_study.study", "run", str(file), "-o", str(folder/name), "-w",
                    str(workers), "--dashboard", ""], check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    done = [json.loads(f.read_text()) for f in (folder/name/"state").glob("*.done")]
    span = pd.to_datetime([d["ended"] for d in done]).max() - pd.to_datetime([d["began"] for d in done]).min()
    return span.total_seconds(), whole


def overhead(folder, seconds, each):
    "Overhead of a waiting run, in ms, by number of workers."
    waiting_notebook(folder)
    start = time.perf_counter()
    for k in range(each):
        given = dict(index=k, seconds=seconds, records=folder/"records.parquet", runs_dir=folder)
        words = [w for name, value in given.items() for w in ("-p", name, str(value))]
        subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(folder/"wait.ipynb"),
                        str(folder/"out.ipynb"), *words], check=True, stderr=subprocess.DEVNULL)
    span = time.perf_counter() - start
    yield dict(what=f"{each} runs of {seconds:g} s, papermill alone", runs=each, seconds=round(span, 2),
               overhead_ms=round(1000*(span/each - seconds)))
    for workers in (1, 2, 4, 8):
        runs = workers*each
        grid = dict(index=list(range(runs)), seconds=seconds, records=str(folder/"records.parquet"))
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
    file, ledger = folder/"many.yaml", st.Ledger(str(folder/"many"))
    file.write_text(yaml.safe_dump(dict(name="many", grids=[grid])))
    plan = st.plan_study(st.read_study(file)); state = folder/"many"/"state"; state.mkdir(parents=True)
    for key, name in zip(plan.key[:-10], plan.name):
        (state/f"{key}.1.claim").write_text("{}")
        (state/f"{key}.done").write_text(json.dumps(dict(key=key, name=name, attempt=1, rows=10, seconds=1., peak=1)))
    def timed(what, *command):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cxr_noise_study.study", *command, str(file), "-o", str(folder/"many")],
                       stdout=subprocess.DEVNULL)
        return dict(what=what, runs=len(plan), seconds=round(time.perf_counter() - start, 2))
    yield timed("plan 10,000 runs, new process", "plan")
    yield timed("plan them and tell how they stand", "status")
    plan.attrs |= {"mark": st.planned(st.read_study(file), ledger).attrs["mark"]}
    st.keep_plan(plan, st.read_study(file), ledger)
    yield timed("tell how they stand, plan kept", "status")
    start = time.perf_counter(); st.look(ledger, list(plan.key), 3)
    yield dict(what="find what is left, in process", runs=len(plan), seconds=round(time.perf_counter() - start, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.); parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent/"results"/"study.csv")
    args = parser.parse_args(); rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for part in (overhead(Path(tmp), args.seconds, args.each), scaling(Path(tmp)), planning(Path(tmp))):
            for row in part:
                rows.append(dict(cores=cores()) | row)
                print(f"{row['what']:42s} {row['seconds']:8.2f} s" + (f"   overhead {row['overhead_ms']:6d} ms a run"
                                                                      if "overhead_ms" in row else ""), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", newline="") as f:
        out = csv.DictWriter(f, ["what", "cores", "runs", "seconds", "command_seconds", "overhead_ms"],
                             lineterminator="\n")
        out.writeheader(); out.writerows(rows)
    one, two = (r["seconds"] for r in rows if r["what"].startswith("4 sweeps"))
    print(f"two workers are {one/two:.2f} times as fast as one on real runs")
    alone = next(r["overhead_ms"] for r in rows if r["what"].endswith("papermill alone"))
    worst = max(r.get("overhead_ms", 0) for r in rows if r.get("what", "").endswith((" 1 workers", " 2 workers")))
    print(f"overhead of a run of one minute: {worst/600:.1f} %; of papermill from the command line: {alone/600:.1f} %")


if __name__ == "__main__": main()
