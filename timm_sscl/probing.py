"""Probe a model: run it once on an example input and leave it unchanged."""
import itertools
import logging
import re
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from timm_sscl.untouched import untouched, without_hooks

__all__ = ['Example', 'ProbeError', 'as_example', 'examples', 'naming_channels', 'probe', 'probe_sizes', 'undisturbed']

_logger = logging.getLogger(__name__)

_IMAGE_SIZES = (32, 64, 28, 224, *range(4, 28), *range(29, 32), *range(33, 64), 96, 128, 256, 299)
_LENGTHS = (16, 64, 128, 256, 1024, 4096)
_FIRST_LAYERS = nn.Embedding, nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase

T = TypeVar('T')


class ProbeError(ValueError):
    """No example input could be run through the model, or the run did not give what was asked for."""


class Example(NamedTuple):
    """Arguments of one call of a model."""
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    def tensors(self) -> List[torch.Tensor]:
        """All tensors among the arguments, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> 'Example':
        """Return the same call with every tensor x replaced by function(x)."""
        args, kwargs = tree_map(
            lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, (self.args, self.kwargs))
        return Example(args, kwargs)

    def with_batch(self, batch: int) -> 'Example':
        """Return the same call with `batch` samples.

        The first axis of the first tensor is the batch axis. Every tensor with as many rows is repeated or cut along
        its first axis. Other tensors stay.
        """
        sizes = [x.shape[0] for x in self.tensors() if x.ndim]
        if not sizes:
            return self

        def resize(x: torch.Tensor) -> torch.Tensor:
            if not x.ndim or x.shape[0] != sizes[0]:
                return x
            return torch.cat([x] * -(-batch // sizes[0]))[:batch]
        return self.map(resize)

    @property
    def batch(self) -> Optional[int]:
        """Number of samples; None without a tensor."""
        return next((x.shape[0] for x in self.tensors() if x.ndim), None)

    def __str__(self) -> str:
        shapes = [tuple(x.shape[1:]) for x in self.tensors() if x.ndim]
        return 'an input of shape ' + ', '.join(map(str, shapes)) if shapes else 'an input without tensors'


# ---- example inputs

def probe_sizes(model: nn.Module) -> List[Tuple[int, ...]]:
    """Return sample shapes to try on a model, small ones first if it takes any size.

    A timm model declares its input size. For other models the first layer decides: (C, L) for Conv1d, (C, H, W) for
    Conv2d, (C, D, H, W) for Conv3d, (F,) and (L, F) for Linear, (L, F) for recurrent layers, (L,) for Embedding.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('input_size'):
        channels = getattr(model, 'in_chans', None) or cfg['input_size'][0]
        img_size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
        full = tuple(img_size) if img_size else tuple(cfg['input_size'][1:])
        any_size = not (cfg.get('fixed_input_size') or img_size)
        info = getattr(getattr(model, 'feature_info', None), 'info', getattr(model, 'feature_info', None)) or []
        smallest = 2 * max([entry['reduction'] for entry in info], default=32)  # deepest map at least 2 x 2
        small = [s for s in (64, 128, 256) if any_size and smallest <= s < min(full)]
        return [(channels, s, s) for s in small[:2]] + [(channels, *full)]
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            return [(module.in_channels, n) for n in _LENGTHS]
        if isinstance(module, nn.Conv2d):
            return [(module.in_channels, s, s) for s in _IMAGE_SIZES]
        if isinstance(module, nn.Conv3d):
            return [(module.in_channels, d, s, s) for s in (32, 64, 112) for d in (8, 16)]
        if isinstance(module, nn.Linear):
            return [(module.in_features,), (16, module.in_features), *_images_of(module.in_features)]
        if isinstance(module, nn.RNNBase):
            return [(16, module.input_size)]
        if isinstance(module, nn.Embedding):
            return [(n,) for n in _LENGTHS]
    return [*((3, s, s) for s in _IMAGE_SIZES), (8, 16), (16,)]


def _images_of(features: int) -> List[Tuple[int, ...]]:
    """Return shapes of square images with `features` values, for networks that flatten an image before their first
    Linear.
    """
    sides = {channels: round((features / channels) ** 0.5) for channels in (1, 3)}
    return [(channels, side, side) for channels, side in sides.items() if channels * side * side == features]


def examples(
        model: nn.Module,
        batch: int,
        input_size: Optional[Sequence[int]] = None,
        example_inputs: Any = None,
) -> Iterator[Example]:
    """Yield calls to try on a model, the most likely first.

    Args:
        model: The model.
        batch: Number of samples.
        input_size: Shape of one sample.
        example_inputs: Input of the model: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Raises:
        ValueError: Both input_size and example_inputs are given, or example_inputs holds no tensor.
    """
    if example_inputs is not None:
        if input_size is not None:
            raise ValueError('input_size and example_inputs both say what the model takes; give one.')
        given = as_example(example_inputs)
        if given.batch is None:
            raise ValueError(f'example_inputs={example_inputs!r}: holds no tensor with a batch axis; give what the '
                             f'model takes, a tensor, a tuple of arguments or a dict of keyword arguments.')
        return iter([given.with_batch(batch)])
    sizes = [tuple(input_size)] if input_size is not None else probe_sizes(model)
    return (Example((_random_input(model, batch, size),), {}) for size in sizes)


def as_example(example_inputs: Any) -> Example:
    """Convert a tensor, a tuple or list of arguments, or a dict of keyword arguments to an Example."""
    if isinstance(example_inputs, dict):
        return Example((), example_inputs)
    return Example(tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {})


def _random_input(model: nn.Module, batch: int, size: Tuple[int, ...]) -> torch.Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)  # leaves the global generator alone
    first = next((m for m in model.modules() if isinstance(m, _FIRST_LAYERS)), None)
    if isinstance(first, nn.Embedding) and len(size) == 1:
        return torch.randint(first.num_embeddings, (batch, *size), generator=generator).to(like.device)
    return torch.randn(batch, *size, generator=generator).to(like)


# ---- the probe

def probe(
        model: nn.Module,
        run: Callable[[Example], T],
        batch: int = 1,
        input_size: Optional[Sequence[int]] = None,
        example_inputs: Any = None,
) -> T:
    """Call run(example) on the first example input that the model accepts, and return its result.

    The model runs without gradients and is left unchanged.

    Args:
        model: The model.
        run: Function that calls the model on the example.
        batch: Number of samples in the example.
        input_size: Shape of one sample; guessed from the model by default.
        example_inputs: Input of the model; see `examples`.

    Raises:
        ProbeError: run failed on every example; the message holds the last error and asks for example_inputs. A
            ProbeError that run itself raised is passed on.
    """
    if any(is_lazy(p) for p in itertools.chain(model.parameters(), model.buffers())):
        raise ProbeError(f'{type(model).__name__} has lazy parameters, whose shapes depend on the first input; run it '
                         f'once on an input of yours first.')
    last: Optional[Tuple[Any, Exception]] = None
    refused: Optional[Tuple[List[int], ProbeError]] = None
    for example in examples(model, batch, input_size, example_inputs):
        if refused is not None and [x.ndim for x in example.tensors()] == refused[0]:
            continue  # the model ran on an input with as many axes; another size would not help
        try:
            with undisturbed(model):
                return run(example)
        except ProbeError as error:  # the model ran, but run rejected the result
            refused = refused or ([x.ndim for x in example.tensors()], error)
        except Exception as error:  # an unknown model may raise anything on an unsuitable input
            last = example, error
            _logger.debug(f'{type(model).__name__} does not run on {example}: {error}')
    if refused is not None:
        raise refused[1]
    assert last is not None  # there is always an example
    tried, reason = last
    raise ProbeError(
        f'{type(model).__name__} does not run on {tried} ({type(reason).__name__}: '
        f'{" ".join(str(reason).split())[:200]}); say what it takes by example_inputs=(a tensor, a tuple of arguments, '
        f'or a dict of keyword arguments) or input_size=(C, H, W).') from reason


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model inside in evaluation mode, eagerly, without gradients and without user hooks; then restore it."""
    with untouched(model), without_hooks(model), torch.compiler.set_stance('force_eager'):
        yield


@contextmanager
def naming_channels(images: torch.Tensor) -> Iterator[None]:
    """Run a model on images inside. If they have another number of channels than it takes, say so in place of torch.

    Raises:
        ValueError: A convolution got the images' number of channels and takes another one.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r'to have (\d+) channels, but got (\d+) channels', str(error))
        if found is None or images.ndim < 3 or int(found[2]) != images.shape[-3]:
            raise
        raise ValueError(f'images: have shape {tuple(images.shape)}, {found[2]} channels, and the model takes '
                         f'{found[1]}.') from error
