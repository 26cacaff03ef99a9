"""The engine's side of shared weights: a tiny model with fused projections, exported by row slices.

As a program it is a process that holds them on the GPU, answers questions about adapters, and ends with its input:

    python tiny_engine.py FOLDER SCHEME DTYPE
"""

from __future__ import annotations

import os
import pickle
import sys

import torch
from transformers import AutoModelForCausalLM

from posttrain.rl.fingerprint import checksum, checksums
from posttrain.rl.sharing import opened, share
from posttrain.rl.types import SharedWeight

FUSED = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))]
ALONE = [("self_attn", ("o_proj",)), ("mlp", ("down_proj",))]


def export(folder, scheme, device="cpu", dtype=torch.float32):
    """The tensors by transformers name and part, which the caller has to keep, and their handles.

    ``scheme``: dense, nf4, fp8 (a scale a layer), fp8-row or fp8-block.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    linears = {}
    for number, layer in enumerate(model.model.layers):
        for block, names in FUSED + ALONE:
            modules = {name: getattr(getattr(layer, block), name) for name in names}
            fused = _fuse([module.weight.detach() for module in modules.values()], scheme)
            linears |= {f"model.layers.{number}.{block}.{name}.weight": one for name, one in zip(names, fused)}
    tied = set(model.all_tied_weights_keys)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
    held = {name: linears.get(name, {"weight": weight}) for name, weight in weights.items()}
    shared = {}
    for name, tensors in held.items():
        kind = scheme.partition("-")[0] if name in linears else "dense"
        shared[name] = SharedWeight(
            scheme=kind,
            tensors={part: share(tensor) for part, tensor in tensors.items()},
            shape=tuple(weights[name].shape),
            checksums=dict(zip(tensors, checksums(list(tensors.values())))),
            origin=f"tiny.{name}",
            block_size=64 if kind == "nf4" else None,
        )
    return held, shared


def _fuse(weights, scheme):
    """The layers' tensors, each a slice of storage that they share."""
    rows = [len(weight) for weight in weights]
    if scheme == "dense":
        return [{"weight": one} for one in torch.cat(weights).split(rows)]
    if scheme == "nf4":
        from bitsandbytes.functional import quantize_4bit

        made = [quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4") for weight in weights]
        bits = torch.cat([bits for bits, _ in made]).split([len(bits) for bits, _ in made])
        absmax = torch.cat([state.absmax for _, state in made]).split([len(state.absmax) for _, state in made])
        return [{"weight": b, "absmax": a, "code": made[0][1].code} for b, a in zip(bits, absmax)]
    parts = [_fp8(weight, scheme) for weight in weights]
    # as vLLM keeps it for its matrix product: the transpose of what is stored
    stored = torch.cat([bits.T.contiguous().view(torch.uint8) for bits, _ in parts], dim=1).view(torch.float8_e4m3fn)
    return [{"weight": bits, "scale": scale} for bits, (_, scale) in zip(stored.T.split(rows), parts)]


def _fp8(weight, scheme):
    weight = weight.float()
    if scheme == "fp8":
        scale = (weight.abs().amax() / 448).reshape(1)
        factors = scale
    elif scheme == "fp8-row":
        scale = factors = weight.abs().amax(dim=1, keepdim=True) / 448
    else:
        blocks = [[block.abs().amax() / 448 for block in row.split(128, dim=1)] for row in weight.split(128)]
        scale = torch.stack([torch.stack(row) for row in blocks])
        factors = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return (weight / factors).to(torch.float8_e4m3fn), scale


def answer(question, held, buffers):
    """For ``None``, the checksums of the engine's weights; for an adapter, what is read through its handle."""
    if question is None:
        return {f"{name}.{part}": checksum(one) for name, parts in held.items() for part, one in parts.items()}
    key = pickle.dumps(question.buffer)
    if key not in buffers:
        buffers[key] = opened(question.buffer)
    views = {name: buffers[key][start:][: torch.Size(shape).numel()] for name, start, shape in question.layout}
    return checksum(buffers[key]), {name: view.cpu() for name, view in views.items()}


def main():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between
    folder, scheme, dtype = sys.argv[1:]
    held, shared = export(folder, scheme, "cuda", getattr(torch, dtype))
    torch.cuda.synchronize()
    buffers = {}
    message = shared
    while True:
        answers.write(pickle.dumps(message))
        answers.flush()
        try:
            message = answer(pickle.load(sys.stdin.buffer), held, buffers)
        except EOFError:
            return


if __name__ == "__main__":
    main()
