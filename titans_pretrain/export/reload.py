"""Load an exported model as a stranger would. Run by its path in a process of its own.

It imports nothing of the project, and its caller sees to it that nothing of the project can be
found. The one argument is a JSON file: ``path`` (where packages lie), ``without`` (packages that
are not to be found: kernels of a GPU), ``project``, ``model``, ``ids`` and ``logits`` (safetensors
in and out), ``whole`` (load it with ``from_pretrained``, too), ``class`` (``module:Class`` of an
installed package, or null where ``AutoModelForCausalLM`` finds it), ``texts``, ``threads``. The
report goes to standard output.

The model runs part by part: no more than one block has weights at a time. The caller's side of the
comparison goes through the same functions.
"""

import contextlib
import functools
import importlib
import json
import site
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def main(request_path: str) -> None:
    """Compute logits and token ids from the directory ``model`` alone."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    if request["class"] is not None:
        site.main()  # packages in development are found by what lies among the others
    sys.path.extend(request["path"])
    sys.modules.update(dict.fromkeys(request["without"]))  # type: ignore[arg-type]

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    directory, trust = Path(request["model"]), {"trust_remote_code": True}
    model_class = _named(request["class"])
    with weightless():
        if model_class is None:
            config = AutoConfig.from_pretrained(directory, **trust)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **trust)
        else:
            model = model_class(model_class.config_class.from_pretrained(directory))
    files = WeightFiles(directory)
    report: dict[str, Any] = {"dtypes": files.dtypes, **files.differences(model)}
    found = {}
    if not (report["missing"] or report["unexpected"] or report["mismatched"]):
        ids = load_file(request["ids"])["ids"]
        found["part by part"] = logits(model, ids, files.read)
        if request["whole"]:
            found["as a whole"] = _whole(directory, ids, report, model_class)
    save_file(found, request["logits"])

    tokenizer = AutoTokenizer.from_pretrained(directory, **trust)
    report["token_ids"] = [tokenizer(text)["input_ids"] for text in request["texts"]]
    project = request["project"]
    report["project"] = sorted(name for name in sys.modules if name.startswith(project))
    print(json.dumps(report))


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Modules made inside have their parameters on meta; their buffers are real."""
    import torch
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: "nn.Module", name: str, parameter: "nn.Parameter | None") -> None:
        if parameter is not None and not parameter.is_meta:
            held = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(held, parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def parts(model: "nn.Module") -> Iterator[tuple[str, "nn.Module"]]:
    """Names and modules that together own all parameters: whole blocks, and what lies outside."""
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        own = next(module.parameters(recurse=False), None) is not None
        if own or type(module).__name__ in blocks:
            yield name, module
        else:
            children = [(f"{name}.{n}".lstrip("."), child) for n, child in module.named_children()]
            waiting += reversed(children)


def logits(
    model: "nn.Module", ids: "Tensor", read: Callable[[Sequence[str]], Iterator["Tensor"]]
) -> "Tensor":
    """Logits (rows, T, V) of a model of which one part at a time has weights.

    Args:
        model: made in ``weightless``.
        ids: (rows, T) token ids.
        read: weights of the parameters of these names, in their order, any dtype.
    """
    import torch

    first = {id(parameter): name for name, parameter in model.named_parameters()}
    handles = []
    for _, part in parts(model):
        places = [
            _Place(owner, key, parameter, first[id(parameter)])
            for owner in part.modules()
            for key, parameter in owner.named_parameters(recurse=False)
        ]
        handles.append(part.register_forward_pre_hook(functools.partial(_fill, places, read)))
        handles.append(part.register_forward_hook(functools.partial(_empty, places)))
    try:
        with torch.no_grad():
            found: Tensor = model.eval()(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return found.contiguous()


class _Place(NamedTuple):
    """A parameter: the module that owns it, its key there, itself on meta, its first full name."""

    owner: "nn.Module"
    key: str
    empty: "nn.Parameter"
    name: str


def _fill(places: Sequence[_Place], read: Any, *arguments: Any) -> None:
    """Give a part its weights before it runs: float32, in memory of their own."""
    import torch
    from torch import nn

    for place, tensor in zip(places, read([place.name for place in places]), strict=True):
        # kernels round differently on unaligned memory, as a mapped file's is: copy always;
        # others do where gradients may be wanted: as in the whole model
        copied = tensor.to(torch.float32, copy=True)
        place.owner._parameters[place.key] = nn.Parameter(copied, place.empty.requires_grad)


def _empty(places: Sequence[_Place], *arguments: Any) -> None:
    """Take a part's weights away after it has run."""
    for place in places:
        place.owner._parameters[place.key] = place.empty


class WeightFiles:
    """The safetensors files of a model's directory, of which no more is mapped than is read.

    Attributes:
        dtypes: safetensors' codes of all tensors, sorted.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        index, self._misplaced = directory / INDEX, set[str]()
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        named: dict[str, str] = {}
        if index.exists():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        codes = set()
        for file in sorted(set(named.values())) or [SINGLE]:
            with safe_open(directory / file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - no mapping
                    entry = handle.get_slice(key)
                    codes.add(entry.get_dtype())
                    self._files[key], self._shapes[key] = directory / file, entry.get_shape()
                    if named and named.get(key) != file:
                        self._misplaced.add(key)
        self._misplaced |= named.keys() - self._files.keys()
        self.dtypes = sorted(codes)

    def differences(self, model: "nn.Module") -> dict[str, list[str]]:
        """Names of ``missing``, ``unexpected`` and ``mismatched`` tensors of a model."""
        wanted = {name: list(p.shape) for name, p in model.named_parameters()}
        both = wanted.keys() & self._shapes.keys()
        wrong = {name for name in both if wanted[name] != self._shapes[name]}
        return {
            "missing": sorted(wanted.keys() - self._shapes.keys()),
            "unexpected": sorted((self._shapes.keys() - wanted.keys()) | self._misplaced),
            "mismatched": sorted(wrong),
        }

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def read(self, names: Sequence[str]) -> Iterator["Tensor"]:
        """Tensors in the order of their names; each must be copied before the next is asked for."""
        from safetensors import safe_open

        for name in names:
            with safe_open(self._files[name], framework="pt") as handle:
                yield handle.get_tensor(name)


def _named(name: str | None) -> Any:
    """The class of a ``module:Class``; None of none."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _whole(directory: Path, ids: "Tensor", report: dict[str, Any], model_class: Any) -> "Tensor":
    """Logits of the model as ``from_pretrained`` loads it; what it complains of is reported."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if model_class is None:
        model_class, options = AutoModelForCausalLM, options | {"trust_remote_code": True}
    model, loading = model_class.from_pretrained(directory, **options)
    for problem in ("missing", "unexpected", "mismatched"):
        report[problem] = sorted(map(str, loading[f"{problem}_keys"]))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # see _fill
    with torch.no_grad():
        found: Tensor = model.eval()(ids, use_cache=False).logits
    return found.contiguous()


if __name__ == "__main__":
    main(sys.argv[1])
