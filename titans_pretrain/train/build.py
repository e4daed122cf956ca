"""What a run is made of at its start: the data, the model in its engine, the random state."""

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titans_pretrain.baselines import foreign
from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import SequenceLoader, open_loader
from titans_pretrain.data.mixture import Corpus
from titans_pretrain.data.storage import shown
from titans_pretrain.errors import UserError
from titans_pretrain.model import fields
from titans_pretrain.parallel.construct import construct, skeleton
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.zero import ZeroEngine
from titans_pretrain.parallel.zero_settings import partitioner
from titans_pretrain.train import kernels, optimizer


@dataclass(frozen=True)
class Data:
    """The prepared data and the order it is read in."""

    loader: SequenceLoader

    @property
    def corpus(self) -> Corpus:
        """What the loader reads."""
        return self.loader.corpus


def open_data(config: RunConfig) -> Data:
    """Open the data of a run and check that the model can read it.

    One rank a node looks at the sizes of all files; the others rely on it.

    Raises:
        UserError: see ``open_loader``; a tokenizer of more pieces than the model has.
    """
    loader = open_loader(
        config.data,
        document_starts=fields.separates_documents(config.model),
        sizes=os.environ.get("LOCAL_RANK", "0") == "0",
    )
    corpus = loader.corpus
    if corpus.vocab_size > config.model["vocab_size"]:
        raise UserError(
            f"model.vocab_size: {config.model['vocab_size']} is less than the tokenizer's "
            f"{corpus.vocab_size} pieces",
            where=_manifests(config),
            fix=f"use model.vocab_size={corpus.vocab_size} or more",
        )
    loader.check_step(config.train.global_batch_size)
    return Data(loader)


def _manifests(config: RunConfig) -> str:
    return ", ".join(shown(manifest) for manifest, _ in config.data.parts)


def build_engine(config: RunConfig, parallel: Parallel, device: torch.device) -> ZeroEngine:
    """The model with the seed's initial weights, whatever the mesh, in an engine.

    Raises:
        UserError: another library's model that cannot be trained here; see ``kernels.choose``.
    """
    if foreign.is_foreign(config.model):
        foreign.check_device(config.model, device.type)
    torch.manual_seed(config.train.seed)  # torch begins with another one in every process
    partition = partitioner(config.train, parallel.groups)
    model = construct(config.model, config.train.seed, parallel, partition)
    matrices = _matrices(config)
    kernels.choose(model, config.train.memory_kernels, config.train.precision, device)
    adam = optimizer.build(model, config.train, matrices)
    engine = ZeroEngine(model, adam, config.train, parallel, device)
    engine.train()
    return engine


def _matrices(config: RunConfig) -> set[str]:
    """Names of the parameters that decay."""
    if foreign.is_foreign(config.model):
        return optimizer.matrices(foreign.skeleton(config.model))
    return optimizer.decayed(skeleton(config.model))


def random_state() -> str:
    """Torch's random state as text."""
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def set_random_state(text: str) -> None:
    """Go on from ``random_state``."""
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8))


def check_data(data: Data, state: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse to go on with other data than a checkpoint's.

    Raises:
        UserError: the data has another fingerprint.
    """
    found, began = data.corpus.fingerprint, state["fingerprint"]
    if found != began:
        raise UserError(
            f"the data has fingerprint {found}, the run began with {began}",
            where=f"data: {_manifests(config)}",
            fix="give the data that the run began with, or begin another run",
        )
