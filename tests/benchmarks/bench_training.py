"""Training a head on kept features against running the frozen network in each epoch; steps against Keras' defaults; memory of streaming.

Names of networks, or `memory`, after the script's name measure these alone; all of it takes an hour."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import keras
import numpy as np
import pandas as pd
from benchmark import peak, peak_of, save, seconds
from PIL import Image
from tqdm import tqdm

from deeptumornet.features import Kept, cut, slice_dataset
from deeptumornet.study import Study
from deeptumornet.training import (
    Learner,
    Network,
    add_head,
    build_body,
    deterministic,
    fine_tuner,
    load_backbone,
    load_network,
    settle,
    shuffled,
    training_dataset,
)

NETWORKS, SIZE, SLICES, EPOCHS, BATCH = ("resnet50", "inceptionv3", "nasnetmobile"), 224, 343, 20, 32
ROUNDS, STEPS = 2, 30
RECIPE = {"optimizer": "adam", "rate": 0.001, "weight_decay": 0.0, "schedule": "constant", "epochs": EPOCHS, "patience": 0, "batch": BATCH,
          "label_smoothing": 0.0, "class_weight": "none", "units": 0, "dropout": 0.0}


def write_slices(folder: Path, count: int, size: int) -> list[Path]:
    noise = np.random.default_rng(0)
    files = [folder / f"{k:05}.png" for k in range(count)]
    for file in tqdm(files, "slices", leave=False):
        coarse = noise.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(file, compress_level=1)
    return files


def made(name: str) -> keras.Model:
    network = load_network(name)
    return add_head(build_body(load_backbone(network, SIZE, "none", Path(".")), network, SIZE), 2, RECIPE, 0)


def on_features(model: keras.Model, files: list[Path], labels: np.ndarray) -> np.ndarray:
    body, top = cut(add_head(model, 2, RECIPE, 0), "features")
    with tempfile.TemporaryDirectory() as cache:
        values, = Kept(body, Path(cache))(files)
    batches, steps = shuffled(lambda part: [values[part]], labels, BATCH, 0)
    head = Learner(top, RECIPE)
    head.fit(batches, labels, steps)
    return head.predict([values])


def as_tutorials_do(model: keras.Model, files: list[Path], labels: np.ndarray) -> np.ndarray:
    """The frozen network in each step, in the same order of slices, by Keras' own fit."""
    model = add_head(model, 2, RECIPE, 0)
    model.get_layer("backbone").trainable = False
    slices = np.concatenate([batch.numpy() for batch in slice_dataset(files)])
    model.compile("adam", "sparse_categorical_crossentropy")
    order = np.random.default_rng(0)
    for _ in range(EPOCHS):
        mixed = order.permutation(len(labels))
        model.fit(slices[mixed], labels[mixed], batch_size=BATCH, shuffle=False, verbose=0)
    return model.predict(slices, batch_size=BATCH, verbose=0)


def timed(work: Callable, *words: object) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    return work(*words), time.perf_counter() - start


def walk(name: str, folder: Path, ours: bool) -> None:
    """Training steps of the whole network at batch 8, ours or with nothing set that Keras does not set by itself: one for each line read,
    and its seconds written."""
    deterministic(0) if ours else keras.utils.set_random_seed(0)
    model, files = made(name), sorted(folder.glob("*.png"))
    x, y = next(iter(training_dataset(files, (np.arange(len(files)) % 2).astype("int64"), 8, 0, None)))
    if ours:
        learner = Learner(model, RECIPE)
        step = lambda: learner.step(x, y, np.ones(8, np.float32))[0].numpy()  # noqa: E731
    else:
        model.compile("adam", "sparse_categorical_crossentropy")
        step = lambda: model.train_on_batch(x, y)  # noqa: E731
    print("ready", flush=True)
    for _ in sys.stdin:
        print(seconds(step), flush=True)


def steps_of(name: str, folder: Path, turn: int) -> dict[bool, list[float]]:
    """The seconds of 1 + STEPS steps in fresh processes, with our settings (True) and with Keras' own, one of each in turn: a machine's
    speed drifts by more than they differ."""
    spent: dict[bool, list[float]] = {True: [], False: []}
    walkers = {ours: subprocess.Popen([sys.executable, __file__, "walk", name, folder, str(int(ours))], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for ours in spent}
    for walker in walkers.values():
        walker.stdout.readline()
    for k in range(1 + STEPS):
        for ours in sorted(walkers, reverse=(turn + k) % 2 == 1):
            print(file=walkers[ours].stdin, flush=True)
            spent[ours].append(float(walkers[ours].stdout.readline()))
    for walker in walkers.values():
        walker.communicate()
    return spent


def stream(folder: Path, count: int) -> None:
    """Keep the features of `count` slices, train a head, a whole small network and its last layer on them, from disk."""
    files = sorted(folder.glob("*.png"))[:count]
    labels = np.arange(count) % 2
    inputs, slices = keras.Input((96, 96, 1)), keras.Input((96, 96, 1))
    maps = keras.layers.Conv2D(64, 9, strides=8, activation="relu", name="stem")(inputs)
    backbone = keras.Model(inputs, keras.layers.Conv2D(64, 1, activation="relu", name="last")(maps), name="backbone")
    pooled = keras.layers.GlobalAveragePooling2D(name="features")(backbone(keras.layers.Rescaling(1 / 255)(slices)))
    model = keras.Model(slices, keras.layers.Dense(2, activation="softmax")(pooled), name="one")
    body, top = cut(model, "features")
    told = RECIPE | {"epochs": 1, "augment": None}
    with tempfile.TemporaryDirectory() as cache:
        values, = Kept(body, Path(cache))(files)
        batches, steps = shuffled(lambda part: [values[part]], labels, BATCH, 0)
        Learner(top, told).fit(batches, labels, steps)
        Learner(model, told).fit(training_dataset(files, labels, BATCH, 0, None), labels, count // BATCH)
        module = ModuleType("deeptumornet.networks.one")
        module.NETWORK = Network("one", "One", "", 96, 96, "unit", ("stem",))
        sys.modules[module.__name__] = module
        study = Study("smoke", Path(cache), Path(cache), {"seed": 0, "classes": ["a", "b"], "positive": "b"})
        (Path(cache) / "data").mkdir()
        study.slices.symlink_to(folder)
        rows = pd.DataFrame({"image_id": [file.stem for file in files], "label": np.where(labels, "b", "a")})
        fine_tuner(model, 1, told, study)(rows[:-count // 10], rows[-count // 10:])


def measure_head(network: str, files: list[Path], labels: np.ndarray) -> None:
    deterministic(0)
    model = made(network)
    settle(model, files)
    rounds = []
    for k in range(ROUNDS):
        arms = (on_features, as_tutorials_do) if k % 2 else (as_tutorials_do, on_features)
        rounds.append({arm.__name__: timed(arm, model, files, labels) for arm in arms})
    pairs = [(r["as_tutorials_do"], r["on_features"]) for r in rounds]
    p = pairs[0][1][0][:, 1]
    save(f"head_{network}", [slow[1] / fast[1] for slow, fast in pairs], "at least 15, with predictions that differ by at most 1e-5",
         f"seconds to train the head of {network} for {EPOCHS} epochs on {SLICES} slices of {SIZE} pixels: the frozen network in each step "
         "by Keras' fit, by kept features", seconds=[[slow[1], fast[1]] for slow, fast in pairs],
         largest_difference=max(float(np.abs(slow[0] - fast[0]).max()) for slow, fast in pairs),
         predictions={"least": float(p.min()), "largest": float(p.max()), "deviation": float(p.std())})


def measure_steps(network: str, folder: Path) -> None:
    rounds = [steps_of(network, folder, turn) for turn in range(ROUNDS)]
    told = f"of the whole network at batch 8 and {SIZE} pixels, ours and Keras' in turn: Keras as it comes (XLA, no determinism) by ours"
    for what, how, part in (("first_step", "first training step", slice(1)),
                            ("steady_step", f"median of the next {STEPS} training steps", slice(1, None))):
        pairs = [[float(np.median(spent[ours][part])) for ours in (False, True)] for spent in rounds]
        save(f"{what}_{network}", [theirs / ours for theirs, ours in pairs], "at least 1", f"{how} {told}", seconds=pairs)


def measure_memory() -> None:
    with tempfile.TemporaryDirectory() as name:
        write_slices(Path(name), 20_000, 96)
        rounds = [[peak_of(__file__, "stream", name, count) for count in (2_000, 20_000)] for _ in range(ROUNDS)]
    save("training_memory", [many / few for few, many in rounds], "at most 300 MB more for ten times the slices",
         "peak resident memory to keep features of 20,000 slices, train on them and on the slices, and fine-tune on kept activations, by "
         "that with 2,000", mb=rounds, more_mb=max(many - few for few, many in rounds))


if __name__ == "__main__":
    if sys.argv[1:2] == ["stream"]:
        stream(Path(sys.argv[2]), int(sys.argv[3]))
        print(peak())
        sys.exit()
    if sys.argv[1:2] == ["walk"]:
        walk(sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "1")
        sys.exit()
    chosen = sys.argv[1:] or [*NETWORKS, "memory"]
    with tempfile.TemporaryDirectory() as name:
        files = write_slices(Path(name), SLICES, SIZE)
        for network in [n for n in chosen if n != "memory"]:
            measure_steps(network, Path(name))
            measure_head(network, files, (np.arange(SLICES) % 2).astype("int64"))
    if "memory" in chosen:
        measure_memory()
