"cxr-study as its users run it, with real processes: killed, started twice, short of disk and memory, on S3."
import errno, json, os, random, signal, socket, subprocess, sys, time, uuid
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import duckdb
import nbformat
import pandas as pd
import psutil
import pytest
import yaml

from cxr_noise_study import study as st
from tests.conftest import ROOT

ROWS = 10
CELLS = ["""index: int = 0
seconds: float = 0.3
fault: str = ""
seed: int = 0
device: str = "cpu"
threads: list = [1]
data_dir: str = ""
journal: str = ""
records: str = ""
weight: int = 0
runs_dir: str = "" """, """import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
def note(what):
    threads, gpu = os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES") or "-"
    line = f"{what} {index} {time.time():.3f} {os.getpid()} {threads} {gpu}\\n".encode()
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT); os.write(file, line); os.close(file)
folder, half = Path(runs_dir)/f"toy-{index}", Path(runs_dir)/f".toy-{index}.partial"
note("read" if folder.exists() else "start")""", """if not folder.exists(): time.sleep(seconds)
if fault == "raise": raise ValueError(f"run {index} was asked to fail")
if fault == "memory": hog = b"x"*(600 << 20); time.sleep(30)
if fault == "kernel": os.kill(os.getpid(), signal.SIGKILL)
if fault == "papermill": os.kill(os.getppid(), signal.SIGKILL); time.sleep(30)
if fault == "detach": subprocess.Popen(["sleep", "300"], start_new_session=True)
if fault == "nothing": sys.exit = None""", """if not folder.exists() and fault != "nothing":
    half.mkdir(exist_ok=True); shutil.copy(records, half); (half/"run.json").write_text(json.dumps({"index": index}))
    (half/"weights").write_bytes(os.urandom(weight)); half.rename(folder)
    note("finish")"""]


@pytest.fixture
def toy(tmp_path):
    "A notebook that waits instead of training, and a way to run studies of it whose processes can be told apart."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3", language="python")
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path/"toy.ipynb")
    pd.DataFrame(dict(dataset="toy", task="A|B", x=range(ROWS))).to_parquet(tmp_path/"records.parquet")
    toy = Toy(tmp_path)
    yield toy
    st.end_tree(toy.living())


class Toy:
    def __init__(self, folder):
        self.folder, self.file, self.out = folder, folder/"study.yaml", folder/"out"
        self.journal, self.mark = folder/"journal", uuid.uuid4().hex

    def write(self, *grids, **common):
        common = dict(journal=str(self.journal), records=str(self.folder/"records.parquet")) | common
        self.file.write_text(yaml.safe_dump(dict(name="toys", notebook="toy.ipynb", common=common, grids=list(grids))))

    def start(self, command="run", *options):
        options = ["-o", str(self.out), *options]
        if command == "run": options += ["--dashboard", "", "--heartbeat", "1"]
        env = os.environ | {"TOY_MARK": self.mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "cxr_noise_study.study", command, str(self.file), *options],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=self.folder,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # not as in a nohup

    def run(self, command="run", *options, expect=0):
        "Run a command, a study in a process of its own; return what it said."
        if command == "run":
            process = self.start(command, *options)
            said = process.communicate(timeout=300)[0]; code = process.returncode
        else:
            with redirect_stdout(StringIO()) as out, redirect_stderr(out):
                code = st.main([command, str(self.file), "-o", str(self.out), *options])
            said = out.getvalue()
        assert code == expect, said[-4000:]
        return said

    def living(self):
        found = []
        for p in psutil.process_iter():
            try: p.environ().get("TOY_MARK") == self.mark and p.status() != "zombie" and found.append(p)
            except psutil.Error: pass
        return found

    def workers(self, process):
        found = []
        for p in psutil.Process(process.pid).children():
            try: "dask_worker" in " ".join(p.cmdline()) and found.append(p)
            except psutil.Error: pass                               # it has just gone
        return found

    def no_orphans(self, seconds=10):
        end = time.time() + seconds
        while self.living() and time.time() < end: time.sleep(.1)
        assert not self.living(), [p.cmdline() for p in self.living()]

    def noted(self):
        lines = [line.split() for line in self.journal.read_text().splitlines()] if self.journal.exists() else []
        names = ["what", "index", "time", "pid", "threads", "gpu"]
        return pd.DataFrame(lines, columns=names).astype({"time": float, "index": int})

    def ledger(self): return st.Ledger(str(self.out))

    def plan(self): return st.plan_study(st.read_study(self.file))

    def survey(self, retries=3): return st.survey(self.plan(), self.ledger(), retries)

    def all_done_once(self, n):
        manifest, noted = self.survey(), self.noted()
        assert len(manifest) == n and (manifest.status == "done").all(), st.status_text(manifest, "toys")
        assert (manifest.rows == ROWS).all() and manifest.name.is_unique
        assert noted[noted.what == "finish"].groupby("index").size().max() == 1            # computed to the end once
        done = list((self.out/"state").glob("*.done")); assert len(done) == n
        for file in done:
            told = json.loads(file.read_text())
            place = self.out/"runs"/told["name"]/f"attempt-{told['attempt']}"
            assert {f.relative_to(place).as_posix(): [f.stat().st_size, st.file_sha(f)]
                    for f in place.rglob("*") if f.is_file()} == told["files"]
            assert {"log.txt", "notebook.ipynb"} < set(told["files"])
        self.no_overlap()
        return manifest

    def no_overlap(self):
        "No attempt at a run began before the one before it had ended or was found dead."
        for _, tries in st.attempts_table(self.ledger()).groupby("key"):
            assert (tries.began >= tries.ended.shift()).iloc[1:].all()
            assert tries.n.tolist() == list(range(1, len(tries) + 1))


def wait_until(true, seconds=60):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it did not come about"
        time.sleep(.05)


def test_ten_workers_killed_and_every_run_done_once(toy):
    toy.write(dict(index=list(range(24))), seconds=.6)
    process, killed, chance = toy.start("run", "-w", "2", "--retries", "50"), 0, random.Random()
    while killed < 10 and process.poll() is None:
        before = len(toy.noted())
        if not toy.workers(process): time.sleep(.1); continue
        wait_until(lambda: process.poll() is not None or len(toy.noted()) > before)
        time.sleep(chance.uniform(0, .8))                           # any moment, in and between runs
        if workers := toy.workers(process): chance.choice(workers).kill(); killed += 1
    said = process.communicate(timeout=240)[0]
    assert killed == 10 and process.returncode == 0, said[-3000:]
    manifest = toy.all_done_once(24)
    assert manifest.attempts.sum() > 24                             # some kills met a run
    toy.no_orphans()
    assert "24 of them done before" in toy.run() and len(list((toy.out/"state").glob("*.beat"))) == 0


def test_scheduler_killed_and_started_again(toy):
    toy.write(dict(index=list(range(6))), seconds=1.)
    for _ in range(2):
        process, before = toy.start("run", "-w", "2"), len(toy.noted())
        wait_until(lambda: len(toy.noted()) > before)
        time.sleep(.4); process.kill(); process.communicate()
        toy.no_orphans()                                            # workers, papermill and kernels went with it
    assert not toy.survey().status.eq("running").any()              # known to be dead, not waited for
    toy.run("run", "-w", "2")
    toy.all_done_once(6); toy.no_orphans()


def test_what_a_run_detaches_ends_with_it_and_nothing_is_imported_from_where_one_stands(toy):
    (toy.folder/"grp.py").write_text("import sys; open('imported', 'a').write(sys.argv[0] + '\\n')")
    toy.write(dict(index=[0, 1], fault="detach"))
    toy.run("run", "-w", "2")
    toy.all_done_once(2); toy.no_orphans(seconds=1)
    who = (toy.folder/"imported").read_text().split()       # the command itself, called as a module, looks there
    assert who and "-c" not in who


def test_two_schedulers_at_once_compute_each_run_once(toy):
    toy.write(dict(index=list(range(8))), seconds=1.)
    both = [toy.start("run", "-w", "1") for _ in range(2)]
    said = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert (toy.all_done_once(8).attempts == 1).all()
    assert (toy.noted().what == "start").sum() == 8
    toy.no_orphans()


def test_faults_of_the_input_are_not_retried_and_others_are(toy):
    kinds = ["", "raise", "memory", "kernel", "papermill", "nothing"]
    toy.write(*[dict(index=k, fault=f) for k, f in enumerate(kinds)])
    said = toy.run("run", "-w", "2", "--retries", "1", "--memory-limit", "500MiB", expect=1)
    table = toy.survey(1).set_index("name"); plan = toy.plan()
    table = table.loc[plan.name].set_axis(kinds)
    assert table.status.to_dict() == {"": "done"} | {k: "failed" for k in kinds[1:]}
    assert table.kind.to_dict() == {"": "", "raise": "input", "memory": "memory", "kernel": "machine",
                                    "papermill": "machine", "nothing": "input"}
    assert table.attempts.tolist() == [1, 1, 1, 2, 2, 1]
    assert "run 1 was asked to fail" in table.error["raise"] and "limit of 500 MiB" in table.error["memory"]
    assert "SIGKILL" in table.error["papermill"] and "records.parquet" in table.error["nothing"]
    assert table.error["raise"] in said and table.peak_memory["memory"] > 500 << 20
    failed = nbformat.read(toy.out/"runs"/plan.name[1]/"attempt-1"/"notebook.ipynb", as_version=4)
    assert [o.evalue for c in failed.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"] \
        == ["run 1 was asked to fail"]
    assert "cell 3 of" not in said and pd.read_parquet(toy.out/"manifest.parquet").status.eq("failed").sum() == 5
    toy.no_orphans()
    toy.run("run", "--retries", "1", expect=1)                      # failed stays failed, and nothing is computed
    assert toy.survey(1).attempts.sum() == 8
    assert "5 failed runs" in toy.run("retry", "--retries", "1")
    toy.run("run", "-w", "2", "--retries", "0", "--memory-limit", "500MiB", expect=1)
    assert toy.survey(0).attempts.tolist() == [1, 2, 2, 3, 3, 2]


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 1 MiB; `grow` makes it larger."
    place = tmp_path/"disk"; place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    def grow(): subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)
    yield place, grow
    subprocess.run(["umount", "-l", str(place)])


def test_disk_full_is_said_and_survived(toy, small_disk):
    toy.out, grow = small_disk[0]/"out", small_disk[1]
    toy.write(dict(index=list(range(6))), weight=300_000)
    said = toy.run("run", "-w", "2", expect=1)
    assert "the disk is full" in said and "goes on from there" in said
    assert 0 < (toy.survey().status == "done").sum() < 6 and not (toy.survey().status == "failed").any()
    toy.no_orphans()
    toy.run("run", "-w", "2", expect=1)                             # still full: nothing is lost, nothing is spoilt
    for file in (toy.out/"state").iterdir(): json.loads(file.read_text())
    grow()
    toy.run("run", "-w", "2")
    assert (toy.survey().status == "done").all() and len(toy.survey()) == 6
    toy.no_orphans()


def test_ledger_on_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    ledger = st.Ledger(str(tmp_path)); st.create(ledger, "k.1.claim", {"a": 1})
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): st.create(ledger, "k.2.claim", {"a": 2})
    assert [f.name for f in (tmp_path/"state").iterdir()] == ["k.1.claim"]
    session = st.Session("s", str(tmp_path), str(ROOT/"nbs"/"04_sweep.ipynb"), "")
    end = st.compute_run(dict(key="k2", name="k2", gpu=False, parameters="{}"), session)
    at = st.Progress(st.deque())
    st.settle_outcome(at, dict(key="k2", name="k2"), end, 3)
    assert (end["verdict"], end["kind"]) == ("trouble", "disk") and "disk is full" in at.halt and len(at.waiting) == 1


@pytest.mark.parametrize("sign,code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_stopped_runs_are_released_and_go_on(toy, sign, code):
    toy.write(dict(index=[0, 1, 2]), seconds=2.)
    process = toy.start("run", "-w", "2")
    wait_until(lambda: len(toy.noted()) == 2)
    process.send_signal(sign); said = process.communicate(timeout=60)[0]
    assert process.returncode == code and "goes on from there" in said and "Traceback" not in said, said
    toy.no_orphans()
    ends = [json.loads(f.read_text()) for f in (toy.out/"state").glob("*.end")]
    assert [e["kind"] for e in ends] == ["released"]*2
    toy.run("run", "-w", "2", "--retries", "0")                     # what was stopped does not count as a fault
    toy.all_done_once(3)


def test_worker_elsewhere_is_taken_over_when_its_heart_stops(toy):
    toy.write(dict(index=[0, 1]))
    key, ledger = toy.plan().key[0], toy.ledger()
    st.create(ledger, f"{key}.1.claim", dict(machine="elsewhere", host="node7", pid=1, start=1, began=st.now()))
    (toy.out/"work"/f"{key}.1"/".toy-0.partial").mkdir(parents=True)
    process = toy.start("run", "-w", "1", "--stale", "4")
    for count in range(4):                                          # it lives
        st.put(ledger, f"state/{key}.1.beat", json.dumps({"count": count}).encode()); time.sleep(2)
        assert not (toy.out/"state"/f"{key}.2.claim").exists() and process.poll() is None
    assert "node7" in toy.run("status", expect=1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert toy.all_done_once(2).set_index("key").attempts[key] == 2
    assert json.loads((toy.out/"state"/f"{key}.1.end").read_text())["error"] == "its heartbeat stopped"
    assert (toy.out/"work"/f"{key}.1"/".toy-0.partial").exists()    # copied, for it may not be dead


def test_late_attempt_neither_spoils_nor_doubles_a_result(tmp_path, toy):
    toy.write(dict(index=0)); ledger, [job] = toy.ledger(), toy.plan().to_dict("records")
    def finished(n):
        work = tmp_path/f"work{n}"; (work/"toy-0").mkdir(parents=True)
        (work/"toy-0"/"records.parquet").write_bytes((toy.folder/"records.parquet").read_bytes())
        (work/"toy-0"/"run.json").write_text(str(n))
        return work
    told = dict(host="h", peak=1, began=st.now(), ended=st.now(), seconds=1.)
    assert st.publish(ledger, job, finished(2), 2, told) and not st.publish(ledger, job, finished(1), 1, told)
    assert json.loads((toy.out/"state"/f"{job['key']}.done").read_text())["attempt"] == 2
    assert [f.name for f in (toy.out/"runs"/job["name"]).iterdir()] == ["attempt-2"]
    assert st.collect(toy.plan(), ledger)["rows"] == ROWS


def test_changed_code_and_parameters_are_other_runs(toy):
    toy.write(dict(index=[0, 1])); toy.run()
    keys = set(toy.plan().key)
    text = toy.folder/"toy.ipynb"; before = text.read_text()
    text.write_text(before.replace("def note(what):", "def note(what):  # a comment"))
    assert set(toy.plan().key) == keys                              # comments are not code
    text.write_text(before.replace('note(\\"finish\\")', 'note(\\"finish\\"); changed = 1'))
    assert not set(toy.plan().key) & keys
    said = toy.run("run", "-w", "2")
    assert "0 of them done before" in said and "no longer planned" in said
    assert toy.survey().planned.tolist() == [True, True, False, False]
    text.write_text(before); toy.write(dict(index=[0, 1, 2]))
    assert "2 of them done before" in toy.run()


def read_both(path):
    "Read a data set with pandas and with DuckDB."
    with duckdb.connect() as db:
        files = f"read_parquet('{path}/**/*.parquet', hive_partitioning=true)"
        return pd.read_parquet(path), db.execute(f"select * from {files}").df()


def test_collected_records_are_read_by_pandas_and_duckdb(toy):
    toy.write(dict(index=[0, 1, 2])); toy.run("run", "-w", "2")
    for _ in range(2): said = toy.run("collect")
    assert "30 records of 3 runs" in said
    path = toy.out/"collected"/"latest"/"records"
    for table in read_both(path):
        assert len(table) == 3*ROWS and set(table.task.astype(str)) == {"A|B"} and table.run.nunique() == 3
        assert (table.groupby("run").x.sum() == sum(range(ROWS))).all()
    runs = pd.read_parquet(toy.out/"collected"/"latest"/"runs.parquet")
    assert runs.rows.sum() == 3*ROWS and {json.loads(t)["index"] for t in runs.run_json} == {0, 1, 2}
    toy.write(dict(index=[0, 1, 2, 3]))
    assert "1 runs are not done yet" in toy.run("collect", expect=1)
    toy.run(); toy.run("collect")
    assert len(pd.read_parquet(path)) == 4*ROWS
    victim = next((toy.out/"runs").rglob("records.parquet")); victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    toy.write(dict(index=[0, 1, 2]))
    toy.run("run"); toy.write(dict(index=[0, 1, 2, 3]))
    (toy.out/"collected"/"latest"/"runs.parquet").unlink()
    assert "is not the file that the run has left" in toy.run("collect", expect=2)


@pytest.fixture
def bucket(monkeypatch):
    "An object store on this machine: bucket URL, storage options."
    boto3 = pytest.importorskip("boto3"); server = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.setenv(name, "toy")
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False); server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1").create_bucket(Bucket="studies")
    yield port, {"client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"}}
    server.stop()


def test_object_store_without_a_common_disk(toy, bucket):
    port, options = bucket; toy.out = "s3://studies/toys"
    toy.write(dict(index=list(range(4))), seconds=1.)
    more = ["--storage-options", json.dumps(options)]
    process = toy.start("run", "-w", "2", "--scratch", str(toy.folder/"scratch"), *more)
    wait_until(lambda: len(toy.noted()) >= 1)
    time.sleep(.5); toy.workers(process)[0].kill()
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    ledger, plan = st.Ledger(toy.out, options), toy.plan()
    manifest = st.survey(plan, ledger)
    assert (manifest.status == "done").all() and (manifest.rows == ROWS).all()
    assert not list((toy.folder/"scratch").rglob("records.parquet"))       # all was sent away
    noted = toy.noted(); assert noted[noted.what == "finish"].groupby("index").size().max() == 1
    assert "4 of them done before" in toy.run("run", *more)
    toy.run("collect", *more)
    path = st.latest(ledger)
    table = pd.read_parquet(f"{toy.out}/{path}/records", storage_options=options)
    assert len(table) == 4*ROWS and table.run.nunique() == 4
    with duckdb.connect() as db:                                           # through fsspec: no extension to download
        db.register_filesystem(ledger.fs)
        [(n,)] = db.execute(f"select count(*) from read_parquet('{toy.out}/{path}/records/**/*.parquet')").fetchall()
    assert n == 4*ROWS
    toy.no_orphans()


def test_exclusive_creation_is_tried_out(tmp_path, bucket, monkeypatch):
    for ledger in st.Ledger(str(tmp_path)), st.Ledger("s3://studies/a", bucket[1]), st.Ledger("memory://a"):
        assert [st.create(ledger, "k.1.claim", {"n": n}) for n in (1, 2)] == [True, False]
        assert st.create(ledger, "k.1.claim", {"n": 1}) == (ledger.local is None)      # our own, sent twice
        st.try_storage(ledger); assert ledger.names() == ["k.1.claim"]
    monkeypatch.setattr(ledger.fs, "pipe_file", lambda path, content, mode: None)
    monkeypatch.setattr(ledger.fs, "cat_file", lambda path: b'{"try": 2}')
    with pytest.raises(ValueError, match="computed twice"): st.try_storage(ledger)


@pytest.mark.parametrize("queue,wanted", [("slurm", ["#SBATCH -p gpu", "#SBATCH -t 08:00:00", "#SBATCH --mem=15G"]),
                                          ("pbs", ["#PBS -q gpu", "#PBS -l walltime=08:00:00"])])
def test_job_script_of_a_queue(toy, queue, wanted):
    toy.write(dict(index=[0, 1])); config = toy.folder/"queue.yaml"
    config.write_text(yaml.safe_dump(dict(queue="gpu", cores=4, memory="16GB", walltime="08:00:00")))
    said = toy.run("script", "--cluster", queue, "--cluster-config", str(config))
    for line in [*wanted, "distributed.cli.dask_worker", "--resources run=1"]: assert line in said, said
    assert "GPU" not in said and "--nworkers" not in said
    assert not toy.out.exists() or not (toy.out/"state").exists()          # nothing was begun
    config.write_text("{colour: red, cores: 1, memory: 1GB}")
    assert "does not describe" in toy.run("script", "--cluster", queue, "--cluster-config", str(config), expect=2)
    config.write_text("{processes: 4, cores: 1, memory: 1GB}")
    said = toy.run("script", "--cluster", queue, "--cluster-config", str(config), expect=2)
    assert "processes is set by the study" in said


GOOD = "name: s\nnotebook: toy.ipynb\ngrids:\n  - index: [0, 1]\n"

@pytest.mark.parametrize("text,said", [
    ("name: [", "is not YAML"), ("- a", "holds no names and values"), ("", "holds no names and values"),
    (GOOD.replace("name: s", "name: a/b"), "'a/b' is not a word"), (GOOD.replace("name: s\n", ""), "name None"),
    (GOOD.replace("toy.ipynb", "no.ipynb"), "no.ipynb is not a file"), (GOOD + "girds: []\n", "Did you mean 'grids'?"),
    ("name: s\nnotebook: toy.ipynb\n", "grids is not a list"), (GOOD + "  - 5\n", "grid 2 is 5"),
    (GOOD + "    indx: 1\n", "Did you mean 'index'?"),
    (GOOD + "    seconds: fast\n", "grid 1, run index=0: seconds 'fast'"),
    (GOOD + "    index: [1]\n", "index stands there twice"), (GOOD + "    seed: []\n", "seed has no value"),
    (GOOD + "    fault: ${NO_SUCH_NAME}\n", "needs the environment variable NO_SUCH_NAME"),
    (GOOD + "    data_dir: /no/such/folder\n", "'/no/such/folder' is not a folder"),
    (GOOD + "    seed: 2020-01-01\n", "is not a value"), (GOOD + "    runs_dir: x\n", "say --output"),
    (GOOD + "    seed: {a: 1}\n", "is not a value"),
    (GOOD + "    exclude: [{index: 7}]\n", "matches no run"),
    (GOOD + "    exclude: {index: 0}\n", "exclude is not a list"),
    (GOOD + "    exclude: [{index: [0, 1]}]\n", "nothing is left of its 2 runs"),
    (GOOD + "common: {seed: [1, 2]}\n", "written as text"), (GOOD + "parameters: no.yaml\n", "no.yaml cannot be read"),
    ("name: s\ngrids:\n  - {arch: [unet, unett]}\n", "run arch=unett: arch 'unett' is not one of"),
    ("name: s\ngrids:\n  - {epoch: 3}\n", "Did you mean 'epochs'?"),
    ("name: s\ngrids:\n  - {train_noise: [0,10]}\n", "train_noise '0'"),
    ("name: s\ngrids:\n  - {device: gpu}\n", "device 'gpu' is not one of"),
    ("name: s\ngrids:\n  - {seed: [0, -1]}\n", "run seed=-1: seed -1 is below")])
def test_wrong_study_files_are_refused(toy, capsys, text, said):
    toy.file.write_text(text)
    assert st.main(["plan", str(toy.file), "-o", str(toy.out)]) == 2
    shown = capsys.readouterr().err
    assert said in shown and str(toy.folder) in shown and not toy.out.exists()


@pytest.mark.parametrize("options,said", [
    (["run", "-w", "0"], "not a positive number"), (["run", "--memory-limit", "much"], "not an amount of memory"),
    (["run", "--cluster-config", "no.yaml", "--cluster", "slurm"], "no.yaml cannot be read"),
    (["run", "--scheduler", "tcp://127.0.0.1:1", "--cluster", "pbs"], "exclude each other"),
    (["script"], "say for which queue"), (["run", "-o", "no-such-protocol://x"], "no-such-protocol"),
    (["run", "--storage-options", "[1]"], "not a JSON object"), (["collect"], "none of the 2 planned runs is done"),
    (["run", "-p", "sed", "1"], "Did you mean 'seed'?"), (["walk"], "invalid choice")])
def test_wrong_commands_are_refused(toy, capsys, monkeypatch, options, said):
    toy.file.write_text(GOOD); monkeypatch.setenv("CXR_NOISE_HOME", str(toy.folder/"home"))
    try: code = st.main([options[0], str(toy.file), *options[1:]])
    except SystemExit as e: code = e.code
    assert code == 2 and said in capsys.readouterr().err


def test_lists_overrides_exclusions_and_duplicates(toy, monkeypatch):
    monkeypatch.setenv("HERE", "3")
    toy.file.write_text(GOOD.replace("[0, 1]", '[0, 1, "${HERE}"]') + '    seed: [0, 1]\n    threads: "1,2"\n'
                        "    exclude:\n      - {index: 0, seed: 1}\n  - index: [0, 5]\n    threads: [[1, 2]]\n")
    plan = toy.plan(); runs = [json.loads(p) for p in plan.parameters]
    assert [(r["index"], r.get("seed")) for r in runs] == [(0, 0), (1, 0), (1, 1), ("3", 0), ("3", 1), (5, None)]
    assert plan.attrs["duplicates"] == 1 and plan.key.is_unique              # 1,2 as text and as a list are the same
    fewer = st.plan_study(st.read_study(toy.file, {"seed": 0}))
    assert len(fewer) == 4 and fewer.attrs["duplicates"] == 1


def test_sweeps_are_checked_as_the_sweep_checks_itself():
    from dataclasses import asdict
    from cxr_noise_study.protocol import check_parameters
    from cxr_noise_study.sweep import COMPUTING
    assert {*COMPUTING, "phantom"} - {"sweep"} <= {f.stem for f in st.code_files(ROOT/"nbs"/"04_sweep.ipynb")}
    for given in [{}, dict(seed=3, lr="1e-4", batch_size=4),
                  dict(arch="fpn", train_noise="0, 10.0", quantum="4,10", electronic=0),
                  dict(task="Effusion|Edema", arch="resnet34", loss="cross_entropy", replicates=2, phantoms=40)]:
        p = check_parameters(given); settled = st.settle_sweep(given)
        same = {k: v for k, v in asdict(p).items() if k in settled}
        assert {k: settled[k] for k in same} == same
        assert settled["conditions"] == sorted((s.s_q, s.s_e) for s in p.conditions)
    base = st.settle_sweep({})
    for change in (dict(seed=1), dict(lr=.1), dict(quantum="0,9", electronic=0), dict(precision="fp32"),
                   dict(train_noise="ladder")):
        assert st.settle_sweep(change) != base
    assert st.settle_sweep(dict(device="cuda")) == base


def test_committed_studies_are_what_they_say(monkeypatch, tmp_path):
    quick = st.plan_study(st.read_study(ROOT/"nbs"/"params"/"study_quick.yaml"))
    assert 6 <= len(quick) <= 24 and quick.attrs["duplicates"] == 0
    for name in ("LANDMARK_DIR", "CHESTXRAY14_DIR"):
        (tmp_path/name).mkdir(); monkeypatch.setenv(name, str(tmp_path/name))
    paper = st.plan_study(st.read_study(ROOT/"nbs"/"params"/"study_paper.yaml", {"weights": "none"}))
    runs = pd.DataFrame([json.loads(p) for p in paper.parameters])
    assert len(runs) == 3*3*3 + 3*3 + 6*3*3 and runs.groupby(["dataset", "task", "arch"]).seed.nunique().eq(3).all()
    assert (runs.source == "Shenzhen").sum() == 9 and runs[runs.dataset == "chestxray14"].task.nunique() == 6
    assert set(runs.epochs) == {200} and set(runs.patience) == {10} and set(runs.lr) == {1e-4}


def test_data_digest_sees_what_changes(tmp_path):
    (tmp_path/"images").mkdir(); (tmp_path/"a.csv").write_text("x"); (tmp_path/"images"/"1.png").write_bytes(b"12")
    seen = [st.data_digest(str(tmp_path))]
    os.utime(tmp_path/"a.csv", (1, 1)); assert st.data_digest(str(tmp_path)) == seen[0]         # a table by its content
    for change in (lambda: (tmp_path/"a.csv").write_text("y"), lambda: os.utime(tmp_path/"images"/"1.png", (1, 1)),
                   lambda: (tmp_path/"images"/"2.png").write_bytes(b""), lambda: (tmp_path/"images"/"1.png").unlink()):
        change(); seen.append(st.data_digest(str(tmp_path)))
    assert len(set(seen)) == len(seen)


def test_ten_thousand_runs_are_listed_keyed_and_resumed(toy):
    toy.write(dict(index=list(range(100)), seed=list(range(100))))
    plan = toy.plan(); assert len(plan) == 10_000 and plan.key.is_unique and plan.name.is_unique
    ledger = toy.ledger(); (toy.out/"state").mkdir(parents=True)
    for key, name in zip(plan.key[:9_990], plan.name):
        (toy.out/"state"/f"{key}.1.claim").write_text("{}")
        told = dict(key=key, name=name, attempt=1, rows=ROWS, seconds=1., peak=1)
        (toy.out/"state"/f"{key}.done").write_text(json.dumps(told))
    manifest = st.survey(plan, ledger)
    assert manifest.status.value_counts().to_dict() == {"done": 9_990, "waiting": 10} and manifest.rows.sum() == 99_900
    assert "9990 done" in st.status_text(manifest, "toys")


def test_gpus_are_resources_of_workers(toy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert st.count_gpus() == 1
    toy.write(dict(index=[0, 1, 2], device="cuda"), dict(index=[3, 4, 5, 6]))
    toy.run("run", "-w", "2")
    toy.all_done_once(7); noted = toy.noted(); noted = noted[noted.what == "start"]
    assert set(noted[noted["index"] < 3].gpu) == {"7"} and noted[noted["index"] < 3].pid.nunique() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ""); toy.write(dict(index=9, device="cuda:0"))
    assert "this machine has no GPU" in toy.run("run", expect=2)


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*_): raise OSError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", no_links); ledger = st.Ledger(str(tmp_path))
    assert [st.create(ledger, "k.1.claim", {"n": n}) for n in (1, 2)] == [True, False]
    assert st.get(ledger, ["k.1.claim"]) == {"k.1.claim": {"n": 1}}; st.try_storage(ledger)


def test_queue_of_slurm_from_submission_to_the_last_run(toy, monkeypatch):
    "With commands in place of SLURM's that start a job at once, on this machine."
    bin = toy.folder/"bin"; bin.mkdir()
    (bin/"sbatch").write_text(f"""#!/bin/bash
cp "$1" {toy.folder}/job.sh
setsid bash {toy.folder}/job.sh > {toy.folder}/job.log 2>&1 < /dev/null &
echo "Submitted batch job $!"
""")
    (bin/"scancel").write_text("#!/bin/bash\nfor j; do kill -- -$j; done\n")
    for f in bin.iterdir(): f.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    config = toy.folder/"queue.yaml"
    config.write_text("{cores: 1, memory: 1GB, walltime: '01:00:00', interface: lo}")
    toy.write(dict(index=[0, 1, 2]))
    toy.run("run", "-w", "1", "--cluster", "slurm", "--cluster-config", str(config))
    assert "#SBATCH" in (toy.folder/"job.sh").read_text()
    toy.all_done_once(3); toy.no_orphans(30)


def test_dask_scheduler_elsewhere_killed_and_started_again(toy):
    env = os.environ | {"TOY_MARK": toy.mark, "PYTHONPATH": str(ROOT)}
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    def begin():
        words = [["dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
                 ["dask_worker", address, "--nthreads", "1", "--no-dashboard", "--resources", "run=1"]]
        return [subprocess.Popen([sys.executable, "-m", f"distributed.cli.{w[0]}", *w[1:]], env=env, cwd=toy.folder,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for w in words]
    toy.write(dict(index=[0, 1, 2]), seconds=2.)
    scheduler, worker = begin(); wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
    process = toy.start("run", "--scheduler", address)
    wait_until(lambda: len(toy.noted()))
    scheduler.kill(); scheduler.wait()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "scheduler is gone" in said and "Traceback" not in said, said
    worker.kill(); worker.wait(); toy.no_orphans()
    scheduler, worker = begin(); wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
    toy.run("run", "--scheduler", address)
    toy.all_done_once(3)
    for p in worker, scheduler: p.kill(); p.wait()
    toy.no_orphans()
    assert "no scheduler answers" in toy.run("run", "--scheduler", address, "-p", "seed", "1", expect=2)
