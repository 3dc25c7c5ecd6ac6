"""Runs, data and models reach the team; a server that is down costs no run, a wrong password is a sentence, and no secret is tracked."""

import base64
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
import requests
import sqlalchemy as sa
from conftest import free_port
from mlflow import MlflowClient

from deeptumornet.commands import main
from deeptumornet.sharing import dagshub, recall, send_runs
from deeptumornet.study import StudyError, open_study, sha256, tracked

ROOT = Path(__file__).resolve().parents[1]
TOKEN, REPOSITORY = "a-token-for-tests-only", "owner/repo"


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A workspace that the tests share: MLflow takes seconds to make its file"
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def server(postgres, port, tmp_path_factory):
    "A real MLflow server on PostgreSQL that asks for a name and a password (both TOKEN); its address"
    folder = tmp_path_factory.mktemp("server")
    with sa.create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool).connect() as database:
        database.execute(sa.text("CREATE DATABASE mlflow"))
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder / 'auth.db'}\nadmin_username = {TOKEN}\n"
        f"admin_password = {TOKEN}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")} | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for tests",
        "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    words = ["server", "--app-name", "basic-auth", "--backend-store-uri", postgres.replace("/postgres", "/mlflow"), "--workers", "1",
             "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([Path(sys.executable).with_name("mlflow"), *words], stdout=log, stderr=log, cwd=folder, env=env,
                                   start_new_session=True)
    try:
        for _ in range(300):
            try:
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                    break
            except requests.RequestException:
                time.sleep(0.3)
            if process.poll() is not None:
                break
        else:
            process.kill()
        if process.poll() is not None:
            pytest.fail((folder / "log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def hub(server):
    "A host laid out like DagsHub before that server: it asks for the token, has no registry and no logged models, and keeps what DVC posts"
    files, refused = {}, []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            chunked = self.headers.get("Transfer-Encoding") == "chunked"
            body = b"".join(iter(self.chunk, b"")) if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"{TOKEN}:{TOKEN}".encode()).decode():
                return self.say(401, b"token, please")
            if not self.path.startswith(f"/{REPOSITORY}."):
                return self.say(404, b"no such repository")
            if self.path.startswith(f"/{REPOSITORY}.dvc"):
                if self.command == "POST":
                    files[self.path] = body
                return self.say(200 if self.path in files else 404, files.get(self.path, b""))
            if any(word in self.path for word in ("registered-models", "model-versions", "logged-models", "/api/3.0/")):
                refused.append(self.path)
                return self.say(404, b'{"error_code": "ENDPOINT_NOT_FOUND"}')
            said = requests.request(self.command, server + self.path.removeprefix(f"/{REPOSITORY}.mlflow"), data=body, timeout=20,
                                    headers={k: self.headers[k] for k in ("Authorization", "Content-Type") if k in self.headers})
            return self.say(said.status_code, said.content)

        def chunk(self):
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        def say(self, status, content):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = do_PATCH = do_DELETE = answer

        def log_message(self, *_):
            pass

    stub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{stub.server_port}", refused
    stub.shutdown()
    stub.server_close()


@pytest.fixture
def at(monkeypatch):
    def set_to(address: str, password: str = TOKEN) -> None:
        for name, value in (("URI", address), ("USERNAME", TOKEN), ("PASSWORD", password)):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield set_to
    mlflow.set_tracking_uri(None)


def shell(folder: Path, *words: str, **env: str) -> str:
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120,
                          env=os.environ | {"PATH": tools} | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc_fails(folder: Path, *words: str, **env: str) -> str:
    "What `dvc` says on stderr where it must fail"
    words = [sys.executable, "-m", "dvc", *words]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | env)
    assert done.returncode and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


TRACKED = ("data/raw/a.bin", "data/raw/b.bin", "models/champion/engine.bin", "reports/metrics.json")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A clone whose data and model are DVC's, and whose report is git's"
    folder = tmp_path_factory.mktemp("first") / "mine"
    folder.mkdir()
    for words in ("git init -q", "git config user.email a@a.invalid", "git config user.name a", "dvc init -q"):
        shell(folder, *words.split())
    for k, name in enumerate(TRACKED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(range(k, 256)) * 100)
    shell(folder, "dvc", "add", "-q", "data/raw", "models/champion")
    (folder / "params.yaml").touch()
    (folder / ".git/info/exclude").write_text(".mlflow.env")
    return folder


@pytest.fixture
def project(first, tmp_path):
    return Path(shutil.copytree(first, tmp_path / "mine"))


def colleague(project: Path, **env: str) -> Path:
    "Commit, push, and pull into a second clone, whose files must be the same"
    shell(project, "git", "add", "-A")
    shell(project, "git", "commit", "-qm", "shared")
    shell(project, "dvc", "push", "-q", **env)
    theirs = project.parent / "theirs"
    shell(project.parent, "git", "clone", "-q", str(project), str(theirs))
    if (project / ".dvc/config.local").is_file():
        (theirs / ".dvc/config.local").write_bytes((project / ".dvc/config.local").read_bytes())
    shell(theirs, "dvc", "pull", "-q", **env)
    assert [sha256(theirs / name) for name in TRACKED] == [sha256(project / name) for name in TRACKED]
    return theirs


def test_a_server_that_is_down_and_started_later(postgres, port, request, at, work, capsys):
    study = open_study("smoke", work)
    at(f"http://127.0.0.1:{port}")
    with tracked(study, "while it is down", {"rate": 0.1}):
        mlflow.log_metric("auc", 0.5)
    assert "refused or did not answer" in capsys.readouterr().err
    server = request.getfixturevalue("server")
    at(server, "a wrong password")
    with pytest.raises(StudyError, match="refused or did not answer.*the runs are kept here") as caught:
        send_runs(study)
    assert "a wrong password" not in str(caught.value)
    at(server)
    with tracked(study, "while it is up"):
        mlflow.log_metric("auc", 0.75)
    assert send_runs(study) == 0 and "refused" not in capsys.readouterr().err
    client = MlflowClient(server)
    runs = client.search_runs([client.get_experiment_by_name("deeptumornet-smoke").experiment_id])
    assert {r.info.run_name: (r.data.metrics["auc"], r.info.status) for r in runs} == {
        "while it is down": (0.5, "FINISHED"), "while it is up": (0.75, "FINISHED")}


def test_dagshub_by_one_command(hub, at, project, work, monkeypatch, capsys):
    host, refused = hub
    monkeypatch.setenv("DAGSHUB_CLIENT_HOST", host)
    monkeypatch.setenv("DAGSHUB_TOKEN", "another token")
    config = (project / ".dvc/config").read_bytes()
    with pytest.raises(StudyError, match="refuses the token"):
        dagshub(project, REPOSITORY)
    monkeypatch.setenv("DAGSHUB_TOKEN", TOKEN)
    with pytest.raises(StudyError, match="is no MLflow server"):
        dagshub(project, "owner/another")
    assert (project / ".dvc/config").read_bytes() == config, "nothing was changed"
    monkeypatch.chdir(project)
    assert main(["dagshub", REPOSITORY]) == 0 and TOKEN not in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another.invalid")
    recall(project)
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://another.invalid", "the environment goes before"
    at("", "")
    recall(project)
    study = open_study("smoke", work, ROOT)
    with tracked(study, "for DagsHub"):
        pass
    sent = mlflow.search_runs(search_all_experiments=True).set_index("tags.mlflow.runName")["tags.sent_to"]
    assert sent["for DagsHub"] == f"{host}/{REPOSITORY}.mlflow" and refused == []
    theirs = colleague(project)
    history = shell(project, "git", "log", "-p", "--all")
    assert TOKEN not in history and f"{REPOSITORY}.dvc" in history
    for secret in (project / ".dvc/config.local", project / ".mlflow.env"):
        assert TOKEN in secret.read_text() and secret.stat().st_mode & 0o77 == 0
        shell(ROOT, "git", "check-ignore", "-q", str(secret.relative_to(project)))
    local = theirs / ".dvc/config.local"
    local.write_text(local.read_text().replace(TOKEN, "a-wrong-token"))
    shutil.rmtree(theirs / ".dvc/cache")
    (theirs / TRACKED[2]).unlink()
    said = dvc_fails(theirs, "pull", "--force")
    assert "ERROR" in said and "a-wrong-token" not in said


def test_the_wrong_keys_of_an_s3_server(project, s3):
    address, keys = s3
    (project / ".dvc/config").write_text(
        f"[core]\n    remote = team\n['remote \"team\"']\n    url = s3://team/store\n    endpointurl = {address}\n")
    theirs = colleague(project, **keys)
    shutil.rmtree(theirs / ".dvc/cache")
    (theirs / TRACKED[2]).unlink()
    for wrong in ({"AWS_SECRET_ACCESS_KEY": "another-secret"}, {"AWS_ACCESS_KEY_ID": "AKIANOBODY"}):
        said = dvc_fails(theirs, "pull", "--force", **(keys | wrong))
        assert "Forbidden" in said and not any(secret in said for secret in [keys["AWS_SECRET_ACCESS_KEY"], *wrong.values()])
    assert not (theirs / TRACKED[2]).exists()
    shell(theirs, "dvc", "pull", "-q", **keys)
    assert sha256(theirs / TRACKED[2]) == sha256(project / TRACKED[2])
    assert keys["AWS_SECRET_ACCESS_KEY"] not in shell(project, "git", "log", "-p", "--all")


def test_a_run_that_was_killed_is_ended_and_sent(server, at, work, monkeypatch, capsys):
    script = """if True:
        import mlflow, os, sys
        from deeptumornet.study import open_study, tracked
        with tracked(open_study("smoke", sys.argv[1]), "killed"):
            with mlflow.start_run(run_name="ended", nested=True):
                mlflow.log_metric("auc", 0.25)
            with mlflow.start_run(run_name="half", nested=True):
                os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", script, str(work)], cwd=ROOT).returncode == -signal.SIGKILL
    (work / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("profile: demo", "profile: smoke", 1))
    (work / "nbs").symlink_to(ROOT / "nbs")
    monkeypatch.chdir(work)
    at("")
    with tracked(open_study(), "goes on"):
        at(server)
        assert main(["share"]) == 0 and "runs sent" in capsys.readouterr().out
    client = MlflowClient(server)
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("deeptumornet-smoke").experiment_id])}
    assert [runs[name].info.status for name in ("killed", "ended", "half")] == ["KILLED", "FINISHED", "KILLED"]
    assert "goes on" not in runs
    assert runs["ended"].data.tags["mlflow.parentRunId"] == runs["killed"].info.run_id and runs["ended"].data.metrics == {"auc": 0.25}


def test_nothing_to_send(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    study = open_study("smoke", tmp_path)
    with pytest.raises(StudyError, match="no server is named"):
        send_runs(study)
    with pytest.raises(StudyError, match="no local runs"):
        send_runs(study, "http://127.0.0.1:9")
