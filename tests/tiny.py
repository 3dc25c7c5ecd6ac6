"""A network that learns in seconds, and the stages that train, tune and fine-tune it, in a process that a test may kill."""

import sys
from pathlib import Path
from types import ModuleType

from deeptumornet.finetuning import finetune
from deeptumornet.study import Study, project_root, read_json
from deeptumornet.training import Network, train
from deeptumornet.tuning import tune

ROOT = project_root(Path(__file__).parent)
module = ModuleType("deeptumornet.networks.tiny")
module.NETWORK = Network("tiny", "Tiny", "MobileNet", 32, 32, "unit", ("conv_pw_12_relu", "conv_pw_11_relu"))
sys.modules[module.__name__] = module


def run(study: Study, *stages: str) -> None:
    for stage in stages or ("train", "tune", "finetune"):
        {"train": lambda: train(study, "tiny"), "tune": lambda: tune(study), "finetune": lambda: finetune(study, "tiny")}[stage]()


if __name__ == "__main__":
    run(Study("smoke", ROOT, Path(sys.argv[1]), read_json(Path(sys.argv[1]) / "params.json")), *sys.argv[2:])
