"""The paper profile on the 343 real slices, from their files to the tuned network: three networks, both protocols, the searches."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from bench_training import write_slices
from benchmark import save

from deeptumornet.training import build_body, deterministic, load_backbone, load_network, settle

ROOT = Path(__file__).resolve().parents[2]
SLICES, INCEPTION = ROOT / "../shared/data/chest_ct_kaggle/Data/train", ROOT / "../shared/weights/inceptionv3_notop.weights.h5"
STAGES = ("collect", "preprocess", "train@resnet50", "train@inceptionv3", "train@nasnetmobile", "tune")


def write_weights(name: str, file: Path, slices: list[Path]) -> None:
    """A weights file of the network `name`: drawn at random, with batch statistics, for without them its features are no numbers."""
    deterministic(1)  # not the study's seed: kernels that are as they were drawn count as not loaded
    network = load_network(name)
    backbone = load_backbone(network, network.native_size, "none", ROOT)
    settle(build_body(backbone, network, 64), slices)
    backbone.save_weights(file)


def copy_of_project(folder: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(("reports/", "dvc.lock")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


if __name__ == "__main__":
    if not (SLICES.is_dir() and INCEPTION.is_file()):
        print(f"bench_paper is skipped: {SLICES.resolve()} or {INCEPTION.resolve()} is missing, and neither may be in this repository")
        sys.exit()
    with tempfile.TemporaryDirectory() as name:
        project, weights = Path(name) / "project", Path(name) / "weights"
        weights.mkdir()
        copy_of_project(project)
        noise = write_slices(weights, 64, 64)
        for network in ("resnet50", "nasnetmobile"):
            write_weights(network, weights / f"{network}.weights.h5", noise)
        params = yaml.safe_load((project / "params.yaml").read_text()) | {"profile": "paper"}
        params["paper"]["collect"]["source"] = str(SLICES.resolve())
        params["paper"]["train"]["weights"] = {"resnet50": str(weights / "resnet50.weights.h5"), "inceptionv3": str(INCEPTION.resolve()),
                                               "nasnetmobile": str(weights / "nasnetmobile.weights.h5")}
        params["paper"]["finetune"]["networks"] = []
        (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(project),
                       "DVC_NO_ANALYTICS": "1"}
        subprocess.run(["dvc", "init", "-q", "--no-scm", "-f"], cwd=project, env=environment, check=True)
        minutes = {}
        for stage in STAGES:
            start = time.perf_counter()
            subprocess.run(["dvc", "repro", "-q", stage], cwd=project, env=environment, check=True)
            minutes[stage] = (time.perf_counter() - start) / 60
    total = sum(minutes.values())
    save("paper_minutes", [total / 15], "at most 1", "minutes of the paper profile on the 343 slices, from files to the tuned network, by "
         "the 15 that are promised: three networks with weights from files, both protocols, the searches, no fine-tuning", minutes=total,
         by_stage=minutes, parameters={stage: params["paper"][stage] for stage in ("preprocess", "tune")})
