"""Training a head on kept features against running the frozen network in each epoch; steps against Keras' defaults; memory of streaming."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from benchmark import peak, peak_of, save, seconds
from PIL import Image
from tqdm import tqdm

from deeptumornet.features import Kept, cut, slice_dataset
from deeptumornet.training import (
    Learner,
    add_head,
    build_body,
    deterministic,
    load_backbone,
    load_network,
    settle,
    shuffled,
    training_dataset,
)

NETWORKS, SIZE, SLICES, EPOCHS, BATCH = ("resnet50", "inceptionv3", "nasnetmobile"), 224, 343, 20, 32
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
    deterministic(0)
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


def first_and_steady(name: str, files: list[Path], labels: np.ndarray, ours: bool) -> tuple[float, float]:
    """Seconds of the first training step of the whole network, and of one of the next four."""
    keras.backend.clear_session()
    model = made(name)
    batches = iter(training_dataset(files, labels, 8, 0, None))
    x, y = next(batches)
    if ours:
        learner = Learner(model, RECIPE)
        step = lambda: learner.step(x, y, np.ones(8, np.float32))[0].numpy()  # noqa: E731
    else:
        model.compile("adam", "sparse_categorical_crossentropy")
        step = lambda: model.train_on_batch(x, y)  # noqa: E731
    first = seconds(step)
    start = time.perf_counter()
    for _ in range(4):
        step()
    return first, (time.perf_counter() - start) / 4


def stream(folder: Path, count: int) -> None:
    """Keep the features of `count` slices and train a head and a whole small network on them, from disk."""
    files = sorted(folder.glob("*.png"))[:count]
    labels = np.arange(count) % 2
    inputs = keras.Input((96, 96, 1))
    maps = keras.layers.Conv2D(512, 9, strides=8, activation="relu")(inputs)
    pooled = keras.layers.GlobalAveragePooling2D(name="features")(maps)
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(pooled), name="one")
    body, top = cut(model, "features")
    with tempfile.TemporaryDirectory() as cache:
        values, = Kept(body, Path(cache))(files)
    batches, steps = shuffled(lambda part: [values[part]], labels, BATCH, 0)
    Learner(top, RECIPE | {"epochs": 1}).fit(batches, labels, steps)
    Learner(model, RECIPE | {"epochs": 1}).fit(training_dataset(files, labels, BATCH, 0, None), labels, count // BATCH)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        stream(Path(sys.argv[1]), int(sys.argv[2]))
        print(peak())
        sys.exit()
    labels = (np.arange(SLICES) % 2).astype("int64")
    with tempfile.TemporaryDirectory() as name:
        files = write_slices(Path(name), SLICES, SIZE)
        for network in NETWORKS:
            model = made(network)
            settle(model, files)
            ours, fast = timed(on_features, model, files, labels)
            theirs, slow = timed(as_tutorials_do, model, files, labels)
            save(f"head_{network}", [slow / fast], "at least 15, with predictions that differ by at most 1e-5",
                 f"seconds to train the head of {network} for {EPOCHS} epochs on {SLICES} slices of {SIZE} pixels: the frozen network in "
                 "each step by Keras' fit, by kept features", seconds=[slow, fast], largest_difference=float(np.abs(ours - theirs).max()))
            pairs = [(first_and_steady(network, files, labels, False), first_and_steady(network, files, labels, True)) for _ in range(2)]
            save(f"first_step_{network}", [theirs[0] / ours[0] for theirs, ours in pairs], "at least 1",
                 "first training step of the whole network at batch 8: Keras' defaults by ours", seconds=pairs)
            save(f"steady_step_{network}", [theirs[1] / ours[1] for theirs, ours in pairs], "at least 1",
                 "one of the next training steps: Keras' defaults by ours", seconds=pairs)
    with tempfile.TemporaryDirectory() as name:
        write_slices(Path(name), 20_000, 96)
        few, many = (peak_of(__file__, name, count) for count in (2_000, 20_000))
    save("training_memory", [many / few], "at most 300 MB more for ten times the slices",
         "peak resident memory to keep features of 20,000 slices and train on them and on the slices, by that with 2,000", mb=[few, many],
         more_mb=many - few)
