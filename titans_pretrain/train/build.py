"""What a run is made of at its start: the data, the model in its engine, the random state."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.data.loader import SequenceLoader
from titans_pretrain.data.shards import TokenShards
from titans_pretrain.errors import UserError
from titans_pretrain.parallel.construct import construct, skeleton
from titans_pretrain.parallel.parallelize import Parallel
from titans_pretrain.parallel.zero import ZeroEngine
from titans_pretrain.parallel.zero_settings import partitioner
from titans_pretrain.train import optimizer


@dataclass(frozen=True)
class Data:
    """The prepared data and the order it is read in."""

    shards: TokenShards
    loader: SequenceLoader


def open_data(config: RunConfig) -> Data:
    """Open the data of a run and check that the model can read it.

    Raises:
        UserError: see ``TokenShards.open`` and ``SequenceLoader``; more pieces than the model has.
    """
    data = config.data
    shards = TokenShards.open(data.manifest)
    if shards.vocab_size > config.model["vocab_size"]:
        raise UserError(
            f"model.vocab_size: {config.model['vocab_size']} is less than the tokenizer's "
            f"{shards.vocab_size} pieces",
            where=data.manifest,
            fix=f"use model.vocab_size={shards.vocab_size} or more",
        )
    loader = SequenceLoader(
        shards,
        sequence_length=data.sequence_length,
        seed=data.seed,
        validation_fraction=data.validation_fraction,
        length_schedule=data.length_schedule,
    )
    loader.check_step(config.train.global_batch_size)
    return Data(shards, loader)


def build_engine(config: RunConfig, parallel: Parallel, device: torch.device) -> ZeroEngine:
    """The model with the seed's initial weights, whatever the mesh, in an engine."""
    torch.manual_seed(config.train.seed)  # torch begins with another one in every process
    partition = partitioner(config.train, parallel.groups)
    model = construct(config.model, config.train.seed, parallel, partition)
    matrices = optimizer.decayed(skeleton(config.model))
    adam = optimizer.build(model, config.train, matrices)
    engine = ZeroEngine(model, adam, config.train, parallel, device)
    engine.train()
    return engine


def random_state() -> str:
    """Torch's random state as text."""
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def set_random_state(text: str) -> None:
    """Go on from ``random_state``."""
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8))


def check_data(data: Data, state: Mapping[str, Any], manifest: str) -> None:
    """Refuse to go on with other data than a checkpoint's.

    Raises:
        UserError: the data has another fingerprint.
    """
    found, began = data.shards.fingerprint, state["fingerprint"]
    if found != began:
        raise UserError(
            f"the data has fingerprint {found}, the run began with {began}",
            where=f"data.manifest: {manifest}",
            fix="give the manifest that the run began with, or begin another run",
        )
