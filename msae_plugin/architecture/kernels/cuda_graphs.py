"""Training steps that are recorded once, as CUDA graphs, and replayed.

A step of the default recipe is about 180 operations beside BatchTopK's 75, and starting each takes
the host 25 microseconds: at every size that was measured it was the host that the GPU waited for
(docs/performance.md). A replay starts two graphs, one forward and one backward, whatever is in
them. What changes from step to step enters as a tensor of numbers; what cannot, such as whether a
penalty is due, is part of the signature under which a recording is kept.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch.autograd.function import FunctionCtx

from msae_plugin.common.errors import RunFailure

# Steps of a signature that run as they are before one is recorded: lazy parts of CUDA are
# initialised by them, and signatures that pass by are not worth a recording.
_STEPS_BEFORE = 3
# Recordings of one SAE that are kept: with dead latents and without, in steps with a penalty and
# without. Each holds the outputs and the gradients of a step.
_MOST_RECORDINGS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutputs:
    """What a step that can be recorded gives."""

    loss: torch.Tensor  # Zero-dimensional, with a gradient
    terms: torch.Tensor  # (n_terms,) values that may be held after the next step
    names: Sequence[str]
    others: Sequence[torch.Tensor]  # Tensors that the next step may overwrite

    def detached(self) -> StepOutputs:
        """The same without the graph behind it."""
        others = [tensor.detach() for tensor in self.others]
        return StepOutputs(self.loss.detach(), self.terms.detach(), self.names, others)


class StepFunction(Protocol):
    """A step that can be recorded."""

    def __call__(
        self,
        inputs: Sequence[torch.Tensor],
        numbers: torch.Tensor,
        parameters: Sequence[torch.Tensor],
    ) -> StepOutputs:
        """Run it with these in place of what it was made from."""
        ...


class Recording(Protocol):
    """A recorded step."""

    inputs: Sequence[torch.Tensor]  # What it reads; overwritten before it is replayed
    numbers: torch.Tensor  # (n_numbers,) float64, likewise
    outputs: StepOutputs  # What `forward` writes
    loss_gradient: torch.Tensor  # Zero-dimensional, what `backward` starts from
    # What `backward` writes, one per parameter; None without a dependence on it
    gradients: Sequence[torch.Tensor | None]

    def forward(self) -> None:
        """Replay the forward pass."""

    def backward(self) -> None:
        """Replay the backward pass."""


class CudaRecording:
    """A step recorded as two CUDA graphs, which runs nothing: buffers are what they were.

    Inputs and numbers are copied, parameters are not. All recordings of an SAE share the memory of
    a pool, since they never run at once.
    """

    def __init__(
        self,
        function: StepFunction,
        inputs: Sequence[torch.Tensor],
        numbers: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        pool: Any,
    ) -> None:
        self.inputs: Sequence[torch.Tensor] = [tensor.clone() for tensor in inputs]
        self.numbers = numbers.clone()
        self.loss_gradient = torch.ones((), device=numbers.device)
        # Other leaves with the same memory: the autograd node that accumulates into a parameter
        # belongs to the stream of the step that first used it, for which a recording may not wait.
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _recording(self._forward, pool, numbers.device):
            outputs = function(self.inputs, self.numbers, leaves)
        with (
            _recording(self._backward, pool, numbers.device),
            # As `loss.backward()` is called: outside the autocast of the step.
            torch.autocast("cuda", enabled=False),
        ):
            self.gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
                outputs.loss,
                leaves,
                self.loss_gradient.to(outputs.loss.dtype),
                allow_unused=True,
            )
        self.outputs = outputs.detached()

    def forward(self) -> None:
        """Replay the forward pass."""
        self._forward.replay()

    def backward(self) -> None:
        """Replay the backward pass."""
        self._backward.replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        steps: RecordedSteps,
        recording: Recording,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        recording.forward()
        ctx.steps, ctx.recording = steps, recording  # pyright: ignore[reportAttributeAccessIssue]
        ctx.ticket = steps.issue_ticket()  # pyright: ignore[reportAttributeAccessIssue]
        ctx.parameters = parameters  # pyright: ignore[reportAttributeAccessIssue]
        outputs = recording.outputs
        terms, others = outputs.terms.clone(), [tensor.detach() for tensor in outputs.others]
        ctx.mark_non_differentiable(terms, *others)
        return outputs.loss.clone(), terms, *others

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.steps.take_ticket(ctx.ticket)
        recording: Recording = ctx.recording
        for parameter, gradient in zip(ctx.parameters, recording.gradients, strict=True):
            # Gradients that are accumulated lie where the next replay writes.
            held = parameter.grad
            if held is not None and gradient is not None and held.data_ptr() == gradient.data_ptr():
                parameter.grad = held.clone()
        recording.loss_gradient.copy_(grad_loss)
        recording.backward()
        gradients = (None if g is None else g.detach() for g in recording.gradients)
        return None, None, *gradients


class RecordedSteps:
    """The recordings of one SAE. A cache: copying or pickling the SAE leaves it behind."""

    def __init__(self, record: Callable[..., Recording] = CudaRecording) -> None:
        self._record = record
        self._seen: Counter[Hashable] = Counter()
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._phase: Hashable = None
        self._pool: Any = None
        self._ticket = 0
        self._failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedSteps:
        return RecordedSteps(self._record)

    def __reduce__(self) -> tuple[type[RecordedSteps], tuple[()]]:
        return RecordedSteps, ()

    @property
    def count(self) -> int:
        """Recordings that are kept."""
        return len(self._recordings)

    def step(
        self,
        function: StepFunction,
        signature: Hashable,
        inputs: Sequence[torch.Tensor],
        numbers: Sequence[float],  # (n_numbers,) what changes from step to step
        parameters: Sequence[torch.Tensor],
        *,
        phase: Hashable = None,
    ) -> StepOutputs | None:
        """Replay a step, recording it first where its signature has been seen before.

        Everything that the step reads beside inputs (of fixed shapes), numbers, parameters and
        buffers is part of the signature. `phase` is a part of it that does not come back: when it
        is another one, earlier recordings are given up. None when the step has to be run as it is.
        """
        if self._failed:
            return None
        if phase != self._phase:
            self._phase = phase
            self.give_up()
        if signature not in self._recordings:
            self._seen[signature] += 1
            if self._seen[signature] <= _STEPS_BEFORE:
                return None
        device = inputs[0].device
        as_tensor = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
        as_tensor = as_tensor.to(device, non_blocking=True)
        recording = self._recordings.get(signature)
        if recording is None:
            try:
                recording = self._new(function, inputs, as_tensor, parameters)
            except Exception as error:  # Whatever it is: a recording is not worth a run.
                self._failed = True
                # The end of a broken recording raises too: what broke it came before.
                reason = str(_first_of(error)).strip().split("\n")[0]
                logger.warning(
                    "the step cannot be recorded as a CUDA graph and runs as it is: %s", reason
                )
                logger.debug("how recording failed", exc_info=error)
                return None
            self._recordings[signature] = recording
            if len(self._recordings) > _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(signature)
        for static, given in zip(recording.inputs, inputs, strict=True):
            static.copy_(given)
        recording.numbers.copy_(as_tensor)
        loss, terms, *others = cast(
            "tuple[torch.Tensor, ...]", _Replay.apply(self, recording, *parameters)
        )
        return StepOutputs(loss, terms, recording.outputs.names, others)

    def give_up(self) -> None:
        """Free what the recordings hold; further steps are recorded anew."""
        self._recordings.clear()
        self._seen.clear()

    def _new(
        self,
        function: StepFunction,
        inputs: Sequence[torch.Tensor],
        numbers: torch.Tensor,
        parameters: Sequence[torch.Tensor],
    ) -> Recording:
        if self._pool is None and numbers.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        return self._record(function, inputs, numbers, parameters, self._pool)

    def issue_ticket(self) -> int:
        """Guard against calling backward twice, or after the next step, on one replay."""
        self._ticket += 1
        return self._ticket

    def take_ticket(self, ticket: int) -> None:
        """Admit the one backward pass of the ticket's step."""
        if ticket != self._ticket:
            raise RunFailure(
                "a recorded step keeps what its backward pass needs until the next one only: call "
                "backward() once per step and before the next step, or set cuda_graphs=False"
            )
        self._ticket += 1


def _first_of(error: BaseException) -> BaseException:
    """The error in whose handling the others were raised."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@cache
def _stream_for_recording(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: their shared memory requires it, and each has its own workspaces."""
    return torch.cuda.Stream(device)


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Generator[None]:
    """Record what the block does on a device; nothing of it runs.

    A recording that breaks off would leave its stream as the current one, and the random generator
    in a state in which it refuses every number ("Offset increment outside graph capture").
    """
    with torch.cuda.device(device):
        outside, stream = torch.cuda.current_stream(device), _stream_for_recording(device)
        try:
            # Other threads, which read activations ahead, go on meanwhile.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            torch.cuda.set_stream(outside)
            # The end of a recording that succeeds releases the generator.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                torch.zeros((), device=device)
            raise
