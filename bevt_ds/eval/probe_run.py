"""Probe a frozen encoder on labelled videos: `bevt_ds/probe.py` without its command line."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from bevt_ds.batch import DTYPES
from bevt_ds.config.parse import to_dict
from bevt_ds.config.schema import ProbeConfig, ProbeRunConfig
from bevt_ds.data.labels import expected_count, read_classes
from bevt_ds.eval.features import Features, extract, features_of, gathered
from bevt_ds.eval.multi_view import check_device, printing_once
from bevt_ds.eval.predictions import Classify, predict
from bevt_ds.eval.probes import (
    AttentiveProbe,
    LinearProbe,
    NearestNeighbours,
    init_probe,
    moments,
    train_probe,
)
from bevt_ds.eval.results import as_lines, claim_folder, write_results
from bevt_ds.eval.videos import each_video, require_decodable_sets, shards_of
from bevt_ds.folders import weights_of
from bevt_ds.model.video_swin import VideoSwin
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.joining import joined_to_measure


def probe(config: ProbeRunConfig) -> int:
    """Extract, fit, test, write and print; returns the exit code."""
    with joined_to_measure() as ranks:
        encoder = load_encoder(config, ranks)
        train, val = (shards_of(patterns, config.data) for patterns in (config.data.train, config.data.val))
        classes = read_classes(train, val, config.data.classes)
        require_decodable_sets({"data.train": train, "data.val": val}, config.data)
        folder = claim_folder(config.output_dir, config.weights, "probe", ranks)
        encode = features_of(encoder, DTYPES[config.precision], config.probe.kind)
        single = replace(config.views, clips=1, crops=1)
        seen = each_video(config.data, single, train, classes, folder, ranks, "training features")
        features = extract(encode, seen, ranks, config.probe.cache_bytes)
        classify = fit(config.probe, features, len(classes), ranks)
        tested = each_video(config.data, config.views, val, classes, folder, ranks)
        predictions = predict(lambda clips: classify(encode(clips)), tested, ranks)
        if ranks.is_main:
            facts = {"training_videos": features.total, "config": to_dict(config)}
            values = write_results(
                folder, predictions, classes.names, expected_count(val, config.data.expected_val), facts
            )
            print(as_lines(values, folder), flush=True)
        return 0


def load_encoder(config: ProbeRunConfig, ranks: Ranks) -> VideoSwin:
    """The encoder that `config.weights` names, in evaluation mode on this rank's device.

    Raises:
        UserError: no such weights; a precision or kernels that the device cannot do.
    """
    check_device(config.precision, config.kernels, ranks)
    with printing_once(ranks):
        model = VideoSwin.from_pretrained(weights_of(config.weights, "weights"), kernels=config.kernels)
    return model.to(ranks.device, DTYPES[config.precision]).eval()


def fit(options: ProbeConfig, features: Features, classes: int, ranks: Ranks) -> Classify:
    """A probe fitted to training features, as a function from features to probabilities (B,K). Collective."""
    if options.kind == "knn":
        bank = gathered(features, ranks)
        values, labels = bank.values.to(ranks.device), bank.labels.to(ranks.device)
        return NearestNeighbours(values, labels, classes, options.k, options.temperature).probabilities
    model: nn.Module
    if options.kind == "attentive":
        model = AttentiveProbe(features.values.shape[-1], classes)
    else:
        model = LinearProbe(*moments(features, ranks), classes)
    init_probe(model, options.seed)
    train_probe(model, features, options, ranks)
    return lambda values: model(values).softmax(-1)
