"""What several test files share: a tiny exported champion, phantom slices that need no file, a PostgreSQL server."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import requests
from hypothesis import settings
from PIL import Image

from deeptumornet.dicom import window
from deeptumornet.log import connect
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import prepare
from deeptumornet.study import StudyError

SIZE = 80
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def phantoms() -> list[np.ndarray]:
    """Four slices in whole HU (float32), normal and with a mass in turn."""
    return [np.round(slice_hu(draw_patient(k, bool(k % 2), 0), 0.1)[0]) for k in range(4)]


@pytest.fixture(scope="session")
def slice_png(phantoms) -> bytes:
    return encoded(window(phantoms[1]))


@pytest.fixture(scope="session")
def champion(tmp_path_factory, phantoms) -> Path:
    """A champion's folder as `10_export` writes it, of two thousand untrained weights.

    Its head is set so that answers differ around one half, and that heat is where features are."""
    import keras
    from keras import layers

    from deeptumornet.export import export_champion
    from deeptumornet.training import save_model

    keras.utils.set_random_seed(0)
    maps = keras.Input((SIZE, SIZE, 1))
    x = layers.Rescaling(1 / 64)(maps)
    x = layers.Conv2D(8, 5, strides=4, padding="same", activation="relu")(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
    backbone = keras.Model(maps, x, name="backbone")
    slices = keras.Input((SIZE, SIZE, 1), name="slices")
    pooled = layers.GlobalAveragePooling2D(name="features")(backbone(slices))
    model = keras.Model(slices, layers.Dense(2, activation="softmax", name="probabilities")(pooled), name="tiny")
    reference = np.stack([prepare(window(hu), SIZE, "lungs") for hu in phantoms])
    strength = np.asarray(keras.Model(slices, pooled)(reference[..., None].astype("float32"))).sum(1).mean()
    head = [np.tile([-3.0, 3.0], (8, 1)), np.array([3 * strength, -3 * strength])]
    model.get_layer("probabilities").set_weights(head)

    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny").mkdir()
    save_model(model, folder / "tiny" / "model.keras")
    auc = {"value": 0.91, "low": 0.84, "high": 0.96, "interval": "bootstrap over groups"}
    card = {
        "network": "tiny", "title": "Tiny", "classes": ["normal", "adenocarcinoma"], "positive": "adenocarcinoma",
        "profile": "smoke", "sources": ["phantom"], "weights": "none", "method": "scratch",
        "input": {"size": SIZE, "channels": 1, "range": [0, 255], "normalise": "lungs"}, "data_sha256": "0" * 64,
        "threshold": {"value": 0.3, "sensitivity": 0.95, "chosen_on": "validation", "n": 40}, "temperature": 1.3,
        "metrics": {"auc": auc, "sensitivity": auc, "specificity": {"value": None, "why": "no slices"},
                    "n": 90, "n_groups": 30},
        "baseline": {"name": "thumbnail", "auc": {"value": 0.7, "low": 0.6, "high": 0.8}}, "code_revision": "0" * 40,
        "intended_use": "research on lung CT slices; no medical device, not for diagnosis",
    }
    export_champion(folder / "tiny", folder / "champion", card, reference, tolerance=1e-4)
    return folder / "champion"


@pytest.fixture(scope="session")
def s3():
    """An S3 server (moto's) in a process of its own, which checks every signature, with the bucket `team`; its address, and its keys."""
    import boto3

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    words = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/tmp")
    try:
        for _ in range(300):
            try:
                requests.get(f"{address}/moto-api/data.json", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        nobody = {"endpoint_url": address, "region_name": "us-east-1", "aws_access_key_id": "-", "aws_secret_access_key": "-"}
        iam = boto3.client("iam", **nobody)
        iam.create_user(UserName="team")
        iam.put_user_policy(UserName="team", PolicyName="store", PolicyDocument=json.dumps(
            {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}))
        made = iam.create_access_key(UserName="team")["AccessKey"]
        boto3.client("s3", **nobody).create_bucket(Bucket="team")
        requests.post(f"{address}/moto-api/reset-auth", data="0", timeout=5).raise_for_status()
        yield address, {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"],
                        "AWS_DEFAULT_REGION": "us-east-1"}
    finally:
        server.kill()
        server.wait()


def running_postgres() -> Iterator[str]:
    """A real PostgreSQL server on loopback, with a password; its SQLAlchemy address."""
    found = shutil.which("initdb") or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None)
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path("/tmp") / f"deeptumornet-postgres-{os.getpid()}"
    folder.mkdir(mode=0o700)
    (folder / "password").write_text("loopback")
    user = {}
    if os.geteuid() == 0:
        try:
            user = {"user": pwd.getpwnam("postgres").pw_uid}
        except KeyError:
            shutil.rmtree(folder)
            pytest.skip("PostgreSQL does not run as root, and this machine has no user postgres")
        for path in (folder, folder / "password"):
            os.chown(path, user["user"], -1)
    port = free_port()
    subprocess.run([found, "-D", folder / "data", "-U", "study", "-A", "scram-sha-256", "--pwfile", folder / "password", "-N"],
                   check=True, capture_output=True, cwd="/tmp", **user)
    server = subprocess.Popen([Path(found).resolve().with_name("postgres"), "-D", folder / "data", "-p", str(port), "-k", folder,
                               "-h", "127.0.0.1", "-F"], stderr=subprocess.DEVNULL, cwd="/tmp", **user)
    address = f"postgresql+psycopg://study:loopback@127.0.0.1:{port}/postgres"
    try:
        for _ in range(100):
            try:
                with connect(address):
                    break
            except StudyError:
                time.sleep(0.1)
        else:
            pytest.fail("the PostgreSQL server did not start in ten seconds")
        yield address
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    yield from running_postgres()
