"""The driver's child process, in which TensorFlow runs: `python -m sattile.training JOB`, JOB being JSON.

`do` lists what to do: `build` (see whether the network can be built), `fit` (train here), `assemble` (make the bundle
of the best weights). What comes of it goes to the file `answer`: `{"done": true, ...}`, `{"usage": text}` or
`{"error": text}`.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from sattile import storage
from sattile.errors import SattileError, UsageError, remedy
from sattile.scorers import import_tensorflow
from sattile.training import fit_worker, loop, networks
from sattile.training.reader import Dataset, Split, load_dataset
from sattile.training.settings import Settings, most_devices

log = logging.getLogger("sattile")


def main(text: str) -> int:
    job = json.loads(text)
    storage.use(_given_access())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("sattile").setLevel(logging.INFO)
    import_tensorflow()  # first of all, without its noise
    try:
        answer: dict[str, Any] = {}
        for one in job["do"]:
            answer |= {"build": build, "fit": fit, "assemble": assemble}[one](job) or {}
        answer["done"] = True
    except UsageError as error:
        answer = {"usage": str(error)}
    except SattileError as error:
        answer = {"error": str(error)}
    except OSError as error:
        log.debug("where it happened:", exc_info=True)
        answer = {"error": f"{error}{remedy(error)}"}
    storage.write_json(job["answer"], answer)
    return 0 if "done" in answer else 1


def _given_access() -> storage.Access | None:
    """The first line of our standard input: how the parent reaches HDFS."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    access: storage.Access | None = pickle.loads(base64.b64decode(line)) if line else None
    return access


def _end_with_parent() -> None:
    """A parent that is gone has closed our standard input."""
    # The raw descriptor: a buffered read would hold a lock that the interpreter wants when it ends.
    while os.read(0, 1024):
        pass
    os._exit(1)


def build(job: Mapping[str, Any]) -> dict[str, Any]:
    """See whether the network can be built, and what it is."""
    network = _network(job)
    networks.check_size(job["settings"]["arch"], network, load_dataset(job["dataset"]).size)
    return {"network": networks.fingerprint(network)}


def _network(job: Mapping[str, Any]) -> Any:
    """The network of a job, with its first weights."""
    return loop.first_network(load_dataset(job["dataset"]), Settings.from_dict(job["settings"]))


def fit(job: Mapping[str, Any]) -> None:
    """What each worker of a cluster does, alone: on this machine's GPUs, or its CPU."""
    tf = import_tensorflow()
    settings = Settings.from_dict(job["settings"])
    names = [one.name.removeprefix("/physical_device:") for one in tf.config.list_physical_devices("GPU")]
    used = names[: most_devices(settings, len(names))]
    if used:
        log.info("train: on %s", ", ".join(used))
    strategy = tf.distribute.MirroredStrategy(used) if len(used) > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        fit_worker(job)


def assemble(job: Mapping[str, Any]) -> None:
    from sattile.model import save_bundle

    described = load_dataset(job["dataset"])
    network = _network(job)
    state = loop.read_best(job["work"])
    network.set_weights(state.weights)
    staged = storage.join(job["work"], "bundle")
    storage.remove(staged)
    storage.write_json(storage.join(staged, "history.json"), state.history)
    logs = storage.join(job["work"], "tensorboard")
    for entry in storage.list_folder(logs):
        storage.write_bytes(storage.join(staged, "tensorboard", storage.name(entry.url)), storage.read_bytes(entry.url))
    save_bundle(
        staged,
        network,
        bands=described.bands,
        classes=described.classes,
        fill=described.mean.tolist(),
        values=described.description["values"],
        gsd=described.description.get("gsd"),
        dataset_digest=described.digest,
        dataset=described.description,
        metrics=state.metrics,
        about={"best_epoch": state.best, **job["settings"]},
        tiles=_tiles_to_compare(described),
    )


COMPARED_PIXELS = 4_000_000


def _tiles_to_compare(described: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Validation tiles, as the network takes them, from all over the split; and which of their pixels count."""
    split = Split(described, "val" if described.tiles("val") else "train")
    count = min(len(split), max(COMPARED_PIXELS // described.size**2, 1))
    images, valids = [], []
    for row in np.linspace(0, len(split) - 1, count).astype(int):
        image, _, valid = split.read(int(row))
        images.append(np.where(valid[..., None], image, described.mean))
        valids.append(valid)
    return np.array(images, np.float32), np.array(valids)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
