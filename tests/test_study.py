"cxr-study as its users run it, with real processes: killed, started twice, short of disk and memory, on S3."
import json, os, random, signal, socket, subprocess, sys, tempfile, time, uuid
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
from cxr_noise_study.images import file_digest
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
gate: str = ""
runs_dir: str = "" """, """import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
def note(what):
    threads, gpu = os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES") or "-"
    line = f"{what} {index} {time.time():.3f} {os.getpid()} {threads} {gpu}\\n".encode()
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT); os.write(file, line); os.close(file)
folder, half = Path(runs_dir)/f"toy-{index}", Path(runs_dir)/f".toy-{index}.partial"
note("read" if folder.exists() else "start")""", """if not folder.exists(): time.sleep(seconds)
while gate and not Path(gate).exists(): time.sleep(.05)
if fault == "raise": raise ValueError(f"run {index} was asked to fail")
if fault == "memory": hog = b"x"*(600 << 20); time.sleep(30)
if fault == "kernel": os.kill(os.getpid(), signal.SIGKILL)
if fault == "worker": os.kill(os.getppid(), signal.SIGKILL); time.sleep(30)
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
    pd.DataFrame(dict(dataset="toy", task="A|B", condition="0,0", x=range(ROWS))).to_parquet(tmp_path/"records.parquet")
    toy = Toy(tmp_path)
    yield toy
    st._kill(toy.living())


class Toy:
    def __init__(self, folder):
        self.folder, self.file, self.out = folder, folder/"study.yaml", folder/"out"
        self.journal, self.mark = folder/"journal", uuid.uuid4().hex

    def write(self, *grids, **common):
        common = dict(journal=str(self.journal), records=str(self.folder/"records.parquet")) | common
        self.file.write_text(yaml.safe_dump(dict(name="toys", notebook="toy.ipynb", common=common, grids=list(grids))))

    def start(self, command="run", *options):
        options = ["-o", str(self.out), *options]
        env = os.environ | {"TOY_MARK": self.mark, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([str(Path(sys.executable).parent/"cxr-study"), command, str(self.file), *options],
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
        "Processes that are forked from the one that has imported everything."
        def below(p): return [c for c in p.children() if "forkserver" in " ".join(c.cmdline())]
        try: return [worker for server in below(psutil.Process(process.pid)) for worker in below(server)]
        except psutil.Error: return []                              # one has just gone

    def no_orphans(self, seconds=10):
        end = time.time() + seconds
        while self.living() and time.time() < end: time.sleep(.1)
        assert not self.living(), [p.cmdline() for p in self.living()]

    def noted(self):
        lines = [line.split() for line in self.journal.read_text().splitlines()] if self.journal.exists() else []
        names = ["what", "index", "time", "pid", "threads", "gpu"]
        return pd.DataFrame(lines, columns=names).astype({"time": float, "index": int})

    def output(self): return st.Output(str(self.out))

    def plan(self): return st.plan_study(st.read_study(self.file))

    def survey(self): return st.survey(self.plan(), self.output())

    def all_done_once(self, n):
        manifest, noted = self.survey(), self.noted()
        assert len(manifest) == n and (manifest.status == "done").all(), st.status_text(manifest, "toys")
        assert (manifest.rows == ROWS).all() and manifest.key.is_unique
        assert noted[noted.what == "finish"].groupby("index").size().max() == 1            # computed to the end once
        for row in manifest.itertuples():
            state, folder = st.read_state(self.output(), row.key), self.out/row.folder
            assert file_digest(folder/"records.parquet") == state["records"]
            assert sorted(f.name for f in folder.iterdir()) == ["records.parquet", "run.json", "weights"]
            assert (folder.parent/"notebook.ipynb").is_file()
            assert [a["kind"] for a in state["attempts"]].count("done") == 1
        assert len(list((self.out/"runs").iterdir())) == n
        self.no_overlap()
        return manifest

    def no_overlap(self):
        "No attempt at a run began before the one before it had ended or was found dead."
        for state in st.read_states(self.output()).values():
            tries = state["attempts"]
            assert all(before["ended"] <= after["began"] for before, after in zip(tries, tries[1:]))


def wait_until(true, seconds=120):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it did not come about"
        time.sleep(.05)


def test_kernel_whose_worker_died_before_it_had_begun_ends():
    command = [sys.executable, "-m", "ipykernel_launcher", *st._KERNEL]
    assert subprocess.run(command, env=os.environ | {"JPY_PARENT_PID": "1"}, timeout=120).returncode == 1


def test_long_names_of_temporary_folders(toy, monkeypatch):
    scratch = toy.folder/("x"*60); scratch.mkdir(); monkeypatch.setenv("TMPDIR", str(scratch))
    toy.write(dict(index=[0])); toy.run("run", "-w", "1")
    toy.all_done_once(1); toy.no_orphans()


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
    assert "24 of them done before" in toy.run()


def test_scheduler_killed_and_started_again(toy):
    toy.write(dict(index=list(range(4))), seconds=1.)
    process = toy.start("run", "-w", "2")
    wait_until(lambda: len(toy.noted()))
    time.sleep(.4); process.kill(); process.communicate()
    toy.no_orphans()                                                # workers, papermill and kernels went with it
    assert not toy.survey().status.eq("running").any()              # known to be dead, not waited for
    toy.run("run", "-w", "2")
    toy.all_done_once(4); toy.no_orphans()


def test_what_a_run_detaches_ends_with_it_and_nothing_is_imported_from_the_current_folder(toy):
    (toy.folder/"grp.py").write_text("open('imported', 'a').write('x')")
    toy.write(dict(index=[0, 1], fault="detach"))
    toy.run("run", "-w", "2")
    toy.all_done_once(2); toy.no_orphans(seconds=1)
    assert not (toy.folder/"imported").exists()


def test_two_schedulers_at_once_compute_each_run_once(toy):
    toy.write(dict(index=list(range(5))), seconds=1.)
    both = [toy.start("run", "-w", "1") for _ in range(2)]
    said = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert (toy.all_done_once(5).attempts == 1).all()
    assert (toy.noted().what == "start").sum() == 5
    toy.no_orphans()


def test_faults_of_the_input_are_not_retried_and_others_are(toy):
    kinds = ["", "raise", "memory", "kernel", "worker", "nothing"]
    toy.write(*[dict(index=k, fault=f) for k, f in enumerate(kinds)])
    said = toy.run("run", "-w", "2", "--retries", "1", "--memory-limit", "500MiB", expect=1)
    table = toy.survey().set_axis(kinds)
    assert table.status.to_dict() == {"": "done"} | {k: "failed" for k in kinds[1:]}
    assert table.kind.to_dict() == {"": "done", "raise": "input", "memory": "memory", "kernel": "machine",
                                    "worker": "machine", "nothing": "input"}
    assert table.attempts.tolist() == [1, 1, 1, 2, 2, 1]
    assert "run 1 was asked to fail" in table.error["raise"] and "limit of 500 MiB" in table.error["memory"]
    assert "worker died" in table.error["worker"] and "records.parquet" in table.error["nothing"]
    assert table.error["raise"] in said and table.peak_memory["memory"] > 500 << 20
    failed = nbformat.read(toy.out/"runs"/table.key["raise"]/"notebook.ipynb", as_version=4)
    assert [o.evalue for c in failed.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"] \
        == ["run 1 was asked to fail"]
    toy.no_orphans()
    toy.run("run", "--retries", "1", expect=1)                      # failed stays failed, and nothing is computed
    assert toy.survey().attempts.sum() == 8
    assert "5 failed runs" in toy.run("retry")
    toy.run("run", "-w", "2", "--retries", "0", "--memory-limit", "500MiB", expect=1)
    assert toy.survey().attempts.tolist() == [1, 2, 2, 3, 3, 2]


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


def test_full_disk_is_reported_and_survived(toy, small_disk):
    toy.out, grow = small_disk[0]/"out", small_disk[1]
    toy.write(dict(index=list(range(6))), weight=300_000)
    said = toy.run("run", "-w", "2", expect=1)
    assert "the disk is full" in said and "computes the rest" in said
    assert 0 < (toy.survey().status == "done").sum() < 6 and not (toy.survey().status == "failed").any()
    toy.no_orphans()
    toy.run("run", "-w", "2", expect=1)                             # still full: nothing is lost, nothing is spoilt
    for file in (toy.out/"state").iterdir(): json.loads(file.read_text())
    grow()
    toy.run("run", "-w", "2")
    assert (toy.survey().status == "done").all() and len(toy.survey()) == 6
    toy.no_orphans()


def test_stopped_runs_are_released_and_go_on(toy):
    gate = toy.folder/"gate"; toy.write(dict(index=[0, 1, 2]), gate=str(gate))
    for k, sign in enumerate((signal.SIGINT, signal.SIGTERM), 1):
        process = toy.start("run", "-w", "2")
        wait_until(lambda: len(toy.noted()) == 2*k)
        process.send_signal(sign); said = process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "computes the rest" in said and "Traceback" not in said, said
        toy.no_orphans()
        assert toy.survey().status.tolist() == ["waiting"]*3
    gate.touch(); toy.run("run", "-w", "2", "--retries", "0")       # what was stopped does not count as a fault
    toy.all_done_once(3)


def test_changed_code_and_parameters_are_other_runs(toy):
    toy.write(dict(index=[0, 1])); toy.run()
    keys = set(toy.plan().key)
    text = toy.folder/"toy.ipynb"; before = text.read_text()
    text.write_text(before.replace("def note(what):", "def note(what):  # a comment"))
    assert set(toy.plan().key) == keys                              # comments are not code
    text.write_text(before.replace('note(\\"finish\\")', 'note(\\"finish\\"); changed = 1'))
    assert not set(toy.plan().key) & keys
    assert st._begin(toy.plan(), toy.output()).done == 0
    text.write_text(before); toy.write(dict(index=[0, 1, 2]))
    assert st._begin(toy.plan(), toy.output()).done == 2


def read_both(path):
    "Read a data set with pandas and with DuckDB."
    with duckdb.connect() as db:
        files = f"read_parquet('{path}/**/*.parquet', hive_partitioning=true)"
        return pd.read_parquet(path), db.execute(f"select * from {files}").df()


def test_collected_records_are_read_by_pandas_and_duckdb(toy):
    toy.write(dict(index=[0, 1, 2])); toy.run("run", "-w", "2")
    for _ in range(2): said = toy.run("collect")
    assert "30 records of 3 runs" in said
    path = toy.out/"collected"/"records"
    for table in read_both(path):
        assert len(table) == 3*ROWS and set(table.task.astype(str)) == {"A|B"} and table.run.nunique() == 3
        assert set(table.condition) == {"0,0"} and (table.groupby("run").x.sum() == sum(range(ROWS))).all()
    runs = pd.read_parquet(toy.out/"collected"/"runs.parquet")
    assert runs["rows"].sum() == 3*ROWS and {json.loads(text)["index"] for text in runs.run_json} == {0, 1, 2}
    toy.write(dict(index=[0, 1, 2, 3]))
    assert "1 runs are not done yet" in toy.run("collect", expect=1)
    victim = next((toy.out/"runs").rglob("records.parquet")); victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert "is not what the run has left" in toy.run("collect", expect=2)
    assert len(pd.read_parquet(path)) == 3*ROWS                     # what was collected before stays


@pytest.fixture
def bucket(monkeypatch):
    "URL of a bucket of its own in an object store on this machine, whose server keeps what other tests left."
    boto3 = pytest.importorskip("boto3"); server = pytest.importorskip("moto.server")
    import s3fs
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.setenv(name, "toy")
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False); server.start()
    host, port = server.get_host_and_port(); name = f"studies-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1").create_bucket(Bucket=name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"); monkeypatch.setenv("AWS_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://{name}"
    server.stop()


def test_object_store_without_a_common_disk(toy, bucket, monkeypatch):
    toy.out, scratch = f"{bucket}/toys", Path(tempfile.mkdtemp()); monkeypatch.setenv("TMPDIR", str(scratch))
    toy.write(dict(index=list(range(4))), seconds=2.)
    process = toy.start("run", "-w", "2")
    wait_until(lambda: len(toy.noted()) >= 1)
    psutil.Process(int(toy.noted().pid[0])).parent().kill()                # the worker that computes it
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    out, manifest = toy.output(), toy.survey()
    assert (manifest.status == "done").all() and (manifest.rows == ROWS).all() and manifest.attempts.sum() > 4
    assert not list(scratch.rglob("records.parquet"))                      # all was uploaded
    left = sorted(Path(f).name for f in out.fs.find(out.path("runs")))
    assert left == sorted(["notebook.ipynb", "records.parquet", "run.json", "weights"]*4)
    assert not out.fs.find(out.path("locks"))
    noted = toy.noted(); assert noted[noted.what == "finish"].groupby("index").size().max() == 1
    assert "4 of them done before" in toy.run("run")
    toy.run("collect")
    table = pd.read_parquet(f"{toy.out}/collected/records")
    assert len(table) == 4*ROWS and table.run.nunique() == 4
    with duckdb.connect() as db:                                           # through fsspec: no extension to download
        db.register_filesystem(out.fs)
        [(n,)] = db.execute(f"select count(*) from read_parquet('{toy.out}/collected/records/*.parquet')").fetchall()
    assert n == 4*ROWS
    toy.no_orphans()


def test_locks_exclude_each_other_in_every_storage(tmp_path, bucket):
    for url in str(tmp_path), f"{bucket}/a", "memory://a":
        out = st.Output(url)
        with st.held(out, "k", "one") as one, st.held(out, "k", "two", 0) as two: assert one() and not two
        with st.held(out, "k", "two", 0) as two: assert two()


def test_silent_owner_in_an_object_store_is_replaced_and_cannot_spoil_the_result(toy, bucket, monkeypatch):
    toy.out = f"{bucket}/toys"; toy.write(dict(index=0)); monkeypatch.setattr(st.tempfile, "tempdir", str(toy.folder))
    out, plan = toy.output(), toy.plan(); job = plan.to_dict("records")[0]; key = job["key"]
    session = st.Session(toy.out, str(toy.folder/"toy.ipynb"), plan.attrs["code"], plan.attrs["modules"])
    late = st.StoreLock(out.fs, out.path("locks", key), "another"); late.acquire(0)
    assert st.compute_run(job, session)["kind"] == "elsewhere" and len(toy.noted()) == 0
    with monkeypatch.context() as m: m.setattr(st, "now", lambda: "2020-01-01T00:00:00+00:00"); late.write()
    with st.held(out, key, "ours") as ours:                         # taken over
        assert ours() and not late.renew()
        error, result, _ = st._compute(out, job, session, late.renew)
        assert error == st._TAKEN and not result                     # the late one has computed, but publishes nothing
    state = st.compute_run(job, session)
    assert state["status"] == "done" and len(out.fs.find(out.path("runs"))) == 4


@pytest.mark.parametrize("queue,wanted", [("slurm", ["#SBATCH -p gpu", "#SBATCH -t 08:00:00", "#SBATCH --mem=15G"]),
                                          ("pbs", ["#PBS -q gpu", "#PBS -l walltime=08:00:00"])])
def test_job_script_of_a_queue(queue, wanted):
    config = dict(queue="gpu", cores=4, memory="16GB", walltime="08:00:00")
    cluster = st.queue_cluster(queue, config)
    with cluster: said = cluster.job_script()
    for line in [*wanted, "distributed.cli.dask_worker", "--resources run=1"]: assert line in said, said
    assert "GPU" not in said and "--nworkers" not in said
    with pytest.raises(ValueError, match="does not describe"): st.queue_cluster(queue, {"colour": "red"})
    with pytest.raises(ValueError, match="processes is set by the study"): st.queue_cluster(queue, {"processes": 4})


GOOD = "name: s\nnotebook: toy.ipynb\ngrids:\n  - index: [0, 1]\n"

LINES = GOOD + "    {}\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k-1}, *a{k-1}, *a{k-1}]\n" for k in range(1, 60))

@pytest.mark.parametrize("text,said", [
    ("name: [", "cannot be read as YAML"), ("- a", "must hold names and values"), ("", "must hold names and values"),
    (GOOD.replace("name: s", "name: a/b"), "got 'a/b'"), (GOOD.replace("name: s\n", ""), "must be text, got None"),
    (GOOD.replace("toy.ipynb", "no.ipynb"), "no.ipynb is not a file"), (GOOD + "girds: []\n", "Did you mean 'grids'?"),
    ("name: s\nnotebook: toy.ipynb\n", "grids must be a list"),
    ("name: s\nnotebook: toy.ipynb\ngrids: []\n", "at least one grid"), (GOOD + "  - 5\n", "grid 2 must hold names and values, got 5"),
    (LINES.format("indx: 1"), "Did you mean 'index'?"), (LINES.format("index: [1]"), "index is given twice"),
    (LINES.format("seed: []"), "seed has no value"), (LINES.format("runs_dir: x"), "use --output"),
    (LINES.format("fault: ${NO_SUCH_NAME}"), "needs the environment variable NO_SUCH_NAME"),
    (LINES.format("data_dir: /no/such/folder"), "'/no/such/folder' is not a folder"),
    (LINES.format("seed: 2020-01-01"), "must be a number, text"), (LINES.format("seed: {a: 1}"), "must be a number, text"),
    (LINES.format("seed: 010"), "line 5: 010 is ambiguous"), (LINES.format("seed: 1:30"), "line 5: 1:30 is ambiguous"),
    (LINES.format("exclude: [{index: 7}]"), "matches no run"),
    (LINES.format("exclude: {index: 0}"), "exclude must be a list"),
    (LINES.format("exclude: [{index: [0, 1]}]"), "exclude leaves nothing of 2 runs"),
    (GOOD + "common: 5\n", "common must hold names and values, got 5"), (GOOD + "parameters: no.yaml\n", "no.yaml cannot be read"),
    (BOMB, "aliases stand for more than 100,000 values"), ("a: &a [*a]", "aliases stand for more"),
    ("a: " + "["*50 + "]"*50, "nested deeper than 20 levels"), ("a: " + "["*3_000, "cannot be read as YAML"),
    ("name: s\nnotebook: toy.ipynb\ngrids:\n  - {" + ", ".join(f"p{k}: {list(range(10))}" for k in range(9)) + "}",
     "at most 100,000 combinations, got 1,000,000,000"),
    ("name: s\ngrids:\n  - {arch: [unet, unett]}\n", "run arch=unett: arch 'unett' is not one of"),
    ("name: s\ngrids:\n  - {epoch: 3}\n", "Did you mean 'epochs'?"),
    ("name: s\ngrids:\n  - {train_noise: [0,10]}\n", "run train_noise=0: train_noise"),
    ("name: s\ngrids:\n  - {device: gpu}\n", "device 'gpu' is not one of"),
    ("name: s\ngrids:\n  - {seed: [0, -1]}\n", "run seed=-1: seed must be ≥ 0, got -1")])
def test_14_17_wrong_study_files_are_refused(toy, capsys, text, said):
    toy.file.write_text(text)
    assert st.main(["plan", str(toy.file), "-o", str(toy.out)]) == 2
    shown = capsys.readouterr().err
    assert said in shown and str(toy.folder) in shown and not toy.out.exists()


@pytest.mark.parametrize("options,said", [
    (["run", "-w", "0"], "--workers must be ≥ 1"), (["run", "--memory-limit", "much"], "--memory-limit"),
    (["run", "--cluster-config", "no.yaml", "--cluster", "slurm"], "no.yaml cannot be read"),
    (["run", "--scheduler", "tcp://127.0.0.1:1", "--cluster", "pbs"], "exclude each other"),
    (["run", "-o", "no-such-protocol://x"], "no-such-protocol"), (["plan", "-o", __file__], "must be a folder, got a file"),
    (["collect"], "none of the 2 planned runs is done"),
    (["run", "-p", "sed", "1"], "Did you mean 'seed'?"), (["walk"], "invalid choice")])
def test_14_17_wrong_commands_are_refused(toy, capsys, monkeypatch, options, said):
    toy.file.write_text(GOOD); monkeypatch.setenv("CXR_NOISE_HOME", str(toy.folder/"home"))
    try: code = st.main([options[0], str(toy.file), *options[1:]])
    except SystemExit as e: code = e.code
    assert code == 2 and said in capsys.readouterr().err


def test_14_17_lists_overrides_exclusions_merge_keys_and_duplicates(toy, monkeypatch):
    monkeypatch.setenv("HERE", "3")
    toy.file.write_text(GOOD.replace("- index: [0, 1]", '- &first\n    index: [0, 1]') + '    seed: [0, 1]\n'
                        "    exclude:\n      - {index: 0, seed: 1}\n"
                        '  - {<<: *first, index: [0, 5], exclude: [], fault: "${HERE}"}\n  - {index: 0, seed: 0}\n')
    plan = toy.plan(); runs = [json.loads(p) for p in plan.parameters]
    assert [(r["index"], r["seed"], r.get("fault")) for r in runs] == [
        (0, 0, None), (1, 0, None), (1, 1, None), (0, 0, "3"), (0, 1, "3"), (5, 0, "3"), (5, 1, "3")]
    assert plan.attrs["duplicates"] == 1 and plan.key.is_unique
    fewer = st.plan_study(st.read_study(toy.file, {"seed": 0}))
    assert len(fewer) == 4


def test_14_17_a_pipe_in_a_data_folder_does_not_hang(toy):
    data = toy.folder/"data"; data.mkdir(); os.mkfifo(data/"manifest.csv"); (data/"again").symlink_to(data)
    toy.write(dict(index=[0], data_dir=str(data)))
    assert "1 runs of toy.ipynb" in toy.run("plan")
    toy.file.unlink(); os.mkfifo(toy.file)
    assert "not a regular file" in toy.run("plan", expect=2)


@pytest.mark.parametrize("line,code", [("plan {} | head -1", 0), ("plan {} >&- 2>&-", 0), ("plan no.yaml 2>&1 | true", 2),
                                       ("--help | true", 0)])
def test_14_18_a_reader_that_has_seen_enough_and_closed_streams(toy, line, code):
    toy.write(dict(index=list(range(300))))
    words = f"{Path(sys.executable).parent/'cxr-study'} {line.format(toy.file)}"
    command = words.split(" | ") if " | " in words else [words, "cat"]
    done = subprocess.run(["bash", "-c", f"({command[0]}; echo $? > code) | {command[1]}"], cwd=toy.folder,
                          capture_output=True, text=True)
    assert (toy.folder/"code").read_text().strip() == str(code) and not done.stderr, done


def test_the_modules_that_count_are_those_of_a_run():
    from cxr_noise_study.runs import COMPUTING
    assert st._modules(ROOT/"nbs"/"04_sweep.ipynb") == COMPUTING


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
    out = toy.output(); (toy.out/"state").mkdir(parents=True)
    state = dict(status="done", kind="done", error="", rows=ROWS, folder="", attempts=[dict(seconds=1., peak=1)])
    for key, name in zip(plan.key[:9_990], plan.name):
        (toy.out/"state"/f"{key}.json").write_text(json.dumps(state | {"name": name}))
    manifest = st.survey(plan, out)
    assert manifest.status.value_counts().to_dict() == {"done": 9_990, "waiting": 10} and manifest.rows.sum() == 99_900
    assert "9990 done" in st.status_text(manifest, "toys") and len(st._begin(plan, out).waiting) == 10


def test_gpus_are_resources_of_workers(toy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert st.visible_gpus() == ["7"]
    toy.write(dict(index=[0, 1], device="cuda"), dict(index=[3, 4, 5]))
    toy.run("run", "-w", "2")
    toy.all_done_once(5); noted = toy.noted(); noted = noted[noted.what == "start"]
    assert set(noted[noted["index"] < 3].gpu) == {"7"} and noted[noted["index"] < 3].pid.nunique() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ""); toy.write(dict(index=9, device="cuda:0"))
    assert "this machine has no GPU" in toy.run("run", expect=2)


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
    env = os.environ | {"TOY_MARK": toy.mark}
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
