"""The contract of a merge method."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmevo.errors import CandidateError
from llmevo.merging.methods.base import Cache, TensorGroup
from llmevo.merging.methods.registry import METHODS, Method, Parameter
from llmevo.models.checkpoints import LowRank

SHARES = (0.45, 0.2, 0.35)
"""Where in its bounds each model's gene is; that of the whole merge is at the first place."""

EDGES: dict[str, list[Tensor]] = {
    "no entry": [torch.zeros(0, 3)] * 4,
    "one entry": [torch.full((1,), float(value)) for value in range(4)],
    "a scalar": [torch.tensor(float(value)) for value in range(4)],
    "zeros": [torch.zeros(3, 2)] * 4,
    "a zero base": [torch.zeros(2, 3), *torch.arange(18.0).view(3, 2, 3).unbind()],
    "all the same": [torch.arange(6.0)] * 4,
    "opposites": [torch.arange(6.0) * sign for sign in (0, 1, -1, 1)],
    "tiny": [torch.arange(6.0) * 1e-30 * sign for sign in (1, 2, -1, 3)],
    "large": [torch.arange(6.0) * 1e15 * sign for sign in (1, 2, -1, 3)],
}
"""Tensors of a base and of three models that divide by zero, overflow or have no entry."""


def bits(tensor: Tensor) -> Tensor:
    """The tensor's memory, so that NaN equals NaN and 0.0 differs from -0.0."""
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


class MergeMethodContract:
    """What a merge method promises to the search, the engines and the exporter. Subclass it with a fixture `method`."""

    fixed: Mapping[str, float] = {}
    """Values, other than the defaults, for parameters that are no genes."""

    @pytest.fixture
    def method(self) -> Method:
        raise NotImplementedError("give the subclass a fixture `method` that returns the Method to test")

    def inputs(self, method: Method, tensors: list[Tensor], shares: tuple[float, ...] = SHARES) -> TensorGroup:
        """A base and as many of the models as the method merges, every gene at its share of its bounds."""
        count = min(3, method.models[1] or 3)
        base, models = tensors[0], tensors[1 : 1 + count]
        each = {name: [self._value(name, p, share) for share in shares[:count]] for name, p in method.each.items()}
        shared = {name: self._value(name, p, shares[0]) for name, p in method.shared.items()}
        return TensorGroup(base if method.starts_from_base else None, models, each, shared, [11, 12, 13][:count])

    def _value(self, name: str, parameter: Parameter, share: float) -> float:
        if parameter.low is None or parameter.high is None:
            return float(self.fixed.get(name, parameter.default or 0.0))
        return parameter.low + share * (parameter.high - parameter.low)

    def typical(self, method: Method, shape: tuple[int, ...] = (7, 11), seed: int = 0) -> TensorGroup:
        """A random base and models near it."""
        generator = torch.Generator().manual_seed(seed)
        base, *changes = (torch.randn(shape, generator=generator) for _ in range(4))
        return self.inputs(method, [base, *(base + 0.1 * change for change in changes)])

    def test_what_it_declares_is_consistent(self, method: Method) -> None:
        assert method.models[0] >= 1
        assert method.models == (1, 1) or not method.pair, "a method on a pair merges one model into the base"
        assert not (method.takes_base and (method.pair or method.may_take_base))
        for name, parameter in {**method.each, **method.shared}.items():
            assert (parameter.low is None) == (parameter.high is None), f"{name} needs both bounds or none"
            if parameter.low is not None and parameter.high is not None:
                assert parameter.low < parameter.high
                for value in (parameter.default, parameter.start):
                    assert value is None or parameter.low <= value <= parameter.high, (
                        f"{name}: {value} is out of bounds"
                    )
            else:
                assert parameter.default is not None, f"{name} has no default and no bounds: no search can set it"

    def test_one_model_with_weight_1_is_that_model(self, method: Method) -> None:
        """The search scores every model alone by it."""
        if "weight" not in method.each:
            pytest.skip("the method has no weights")
        inputs = self.typical(method)
        start = {name: [float(p.start or 0.0)] * len(inputs.models) for name, p in method.each.items()}
        shared = {name: float(p.default or 0.0) for name, p in method.shared.items()}
        for place in range(len(inputs.models)):
            weights = [float(place == other) for other in range(len(inputs.models))]
            alone = method.merge(replace(inputs, each={**start, "weight": weights}, shared=shared))
            torch.testing.assert_close(alone, inputs.weight(place), rtol=0, atol=1e-6)

    def test_its_neutral_value_makes_it_task_arithmetic(self, method: Method) -> None:
        """Bit for bit, so that a search can leave the method out."""
        inputs, own = self.typical(method), method.shared
        for name, parameter in own.items():
            if parameter.neutral is not None:
                shared = {key: float(p.default or 0.0) for key, p in own.items()} | {name: parameter.neutral}
                given = replace(inputs, shared={"normalize": 0.0, "lambda": 1.0, **shared})
                assert torch.equal(bits(method.merge(given)), bits(METHODS["task_arithmetic"].merge(given)))

    def test_a_merge_leaves_its_inputs_as_they_were(self, method: Method) -> None:
        inputs = self.typical(method)
        tensors = [tensor for tensor in (inputs.base, *inputs.models) if isinstance(tensor, Tensor)]
        copies = [tensor.clone() for tensor in tensors]
        method.merge(inputs)
        assert all(torch.equal(now, before) for now, before in zip(tensors, copies, strict=True))

    def test_16_bit_inputs_are_merged_in_float32_and_rounded_once(self, method: Method) -> None:
        inputs = self.typical(method, (40, 50))
        base = None if inputs.base is None else inputs.base.bfloat16()
        models = [model.bfloat16() for model in inputs.models if isinstance(model, Tensor)]
        stored = replace(inputs, base=base, models=models, dtype=torch.bfloat16)
        wide = replace(inputs, base=None if base is None else base.float(), models=[model.float() for model in models])
        assert torch.equal(bits(method.merge(stored).bfloat16()), bits(method.merge(wide).bfloat16()))
        halves = replace(stored, base=None if base is None else base.half(), models=[m.half() for m in models])
        assert method.merge(replace(halves, dtype=torch.float16)).dtype in (torch.float16, torch.float32)

    def test_the_bits_follow_from_the_inputs_alone(self, method: Method) -> None:
        """Not from the number of threads, the cache, or the state of the global random generator."""
        inputs = self.typical(method, (401, 403))
        plain = method.merge(inputs)
        kept = replace(inputs, keys=[*range(len(inputs.models))], cache=Cache(1e9))
        threads = torch.get_num_threads()
        try:
            for count in (2, 3):
                torch.set_num_threads(count)
                torch.rand(5)
                assert torch.equal(bits(method.merge(inputs)), bits(plain))
            for _ in range(2):
                assert torch.equal(bits(method.merge(kept)), bits(plain))
        finally:
            torch.set_num_threads(threads)

    def test_what_is_cached_holds_for_other_genes_too(self, method: Method) -> None:
        inputs = self.typical(method, (130, 120))
        kept = replace(inputs, keys=[*range(len(inputs.models))], cache=Cache(1e9))
        method.merge(kept)
        for factor in (0.5, 0.499, 1.0, 0.98765432):
            each = {name: [value * factor for value in values] for name, values in inputs.each.items()}
            genes = [name for name, parameter in method.shared.items() if parameter.is_gene]
            shared = {name: v * factor if name in genes else v for name, v in inputs.shared.items()}
            plain = method.merge(replace(inputs, each=each, shared=shared))
            assert torch.equal(bits(method.merge(replace(kept, each=each, shared=shared))), bits(plain))

    @pytest.mark.parametrize("low_rank", [(True, True, True), (True, False, True)])
    @pytest.mark.parametrize("over_base", [True, False])
    def test_a_low_rank_model_merges_like_the_tensor_it_stands_for(
        self, method: Method, low_rank: tuple[bool, ...], over_base: bool
    ) -> None:
        inputs, other, base = self.typical(method), self.typical(method, seed=5), self.typical(method, seed=6).weight(0)
        generator = torch.Generator().manual_seed(1)
        under = base if over_base else other.weight(0)
        pairs = [
            LowRank(under, torch.randn((7, 2), generator=generator), torch.randn((2, 11), generator=generator))
            for _ in inputs.models
        ]
        mixed = [pair if low else pair.dense() for pair, low in zip(pairs, low_rank, strict=False)]
        origin = None if inputs.base is None else base
        whole = method.merge(replace(inputs, base=origin, models=[pair.dense() for pair in pairs]))
        result = method.merge(replace(inputs, base=origin, models=mixed))
        torch.testing.assert_close(result, whole, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("tensors", EDGES.values(), ids=EDGES.keys())
    def test_no_point_within_the_bounds_gives_what_is_not_finite(self, method: Method, tensors: list[Tensor]) -> None:
        for shares in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), SHARES):
            try:
                result = method.merge(self.inputs(method, tensors, shares))
            except CandidateError:  # parameters that make no sense together
                continue
            assert result.shape == tensors[0].shape
            assert torch.isfinite(result).all()
