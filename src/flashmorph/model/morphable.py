"""The morphable model: a host whose attention layers hold several branches, mixed by gates.

    layer output = sum over options o of W_o (gate[layer, o] * heads_o(hidden)) + gate[layer, o] * b_o

W_o and b_o are the branch's output projection. Every branch runs whatever its gate is, so that a gate at 0
still gets a gradient. Only under `no_grad` does a layer leave out branches whose gates are all 0.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from flashmorph.hosts import host_of, layer_space, use_kernels
from flashmorph.hosts.build import empty_model
from flashmorph.hosts.parts import decoder_of, layer_prefix, layers_of
from flashmorph.mixers.mixer import LayerArguments
from flashmorph.model.layer import Branch, MorphableLayer, Observer, relative_error
from flashmorph.model.order import run_order
from flashmorph.model.recompute import recomputed, recomputes
from flashmorph.plan import FULL, Budget, Plan, Space


class Morphable(nn.Module):
    """A host with all its branches. The host's weights are frozen; only branches other than `full` can train."""

    def __init__(self, model: PreTrainedModel):
        """Give every layer of `model` (a host, all layers full) one untrained branch for each other option."""
        super().__init__()
        self.host = host_of(model.config)
        use_kernels(self.host.model_type)
        self.options = tuple(self.host.mixers)
        self.model = model.requires_grad_(False).eval()
        self.model.config.use_cache = False
        layers = layers_of(self.model)
        for number, layer in enumerate(layers):
            attention = getattr(layer, self.host.slot(FULL))
            weight = next(attention.parameters())
            branches = {}
            for option, mixer in self.host.mixers.items():
                module = mixer.build(model.config, number, attention)
                if option != FULL and mixer.trainable:
                    module = module.to(weight.device, torch.float32).requires_grad_(False)
                branches[option] = Branch(mixer, module)
            setattr(layer, self.host.slot(FULL), MorphableLayer(number, len(layers), branches))

    @property
    def layers(self) -> list[MorphableLayer]:
        """The morphable layers, from the first to the last."""
        return [getattr(layer, self.host.slot(FULL)) for layer in layers_of(self.model)]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def space(self, budget: Budget) -> Space:
        """The space of plans, its cost in the budget's resource."""
        return layer_space(self.host, self.model.config, budget)

    def forward(
        self,
        input_ids: torch.Tensor,
        gates: torch.Tensor | None = None,
        boundaries: LayerArguments | None = None,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """Last hidden states `[batch, time, width]` under `gates` `[groups, options]` (the teacher's without).

        Gates without a gradient belong on the CPU: each layer reads its own, which would wait for a GPU.

        Rows `[batch, time]` are of equal length; padding may only be on the right, where nothing looks. `boundaries`
        are the arguments that keep documents in a row apart (`isolation.marked`). Every layer's forward is shown to the
        `observer`.
        """
        # The decoder hands what it does not know itself on to its layers, and they to their mixers.
        arguments = {"gates": gates, "observer": observer, **(boundaries or {})}
        learning = torch.is_grad_enabled() and gates is not None and gates.requires_grad
        again = learning and recomputes(self.model.config, input_ids.numel())
        with recomputed(layers_of(self.model)) if again else nullcontext():
            return decoder_of(self.model)(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state

    @torch.no_grad()
    def each_plan(self, input_ids: torch.Tensor, gates: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Index and last hidden states `[batch, time, width]` of each plan: one-hot `gates` `[plans, groups, options]`.

        Layers that two plans share from the first one up are computed once: plans are run in the order of their
        assignments, each from the first layer on that differs from the plan before. One hidden state is kept for each
        depth at which plans diverge. The order of the results is that of the runs.
        """
        order = run_order(gates, len(self.layers))
        decoder = decoder_of(self.model)
        every = decoder.layers
        kept: dict[int, torch.Tensor] = {}
        for turn, (index, start) in enumerate(order):
            stops = {later for _, later in order[turn + 1 :] if later > start}
            hooks = [
                every[stop].register_forward_pre_hook(
                    lambda module, inputs, stop=stop: kept.__setitem__(stop, inputs[0])
                )
                for stop in stops
            ]
            try:
                if start:
                    decoder.layers = nn.ModuleList([_Resume(kept[start]), *every[start:]])
                hidden = decoder(input_ids=input_ids, use_cache=False, gates=gates[index]).last_hidden_state
            finally:
                decoder.layers = every
                for hook in hooks:
                    hook.remove()
            yield index, hidden

    def branch_parameters(self) -> list[list[nn.Parameter]]:
        """The weights that alignment trains, one list a branch."""
        return [[*branch.parameters()] for layer in self.layers for branch in layer.trained.values()]

    def branch_state(self) -> dict[str, torch.Tensor]:
        """The weights of all branches but `full`, under names like `layers.3.linear.in_proj_z.weight`."""
        return {
            f"layers.{number}.{option}.{name}": weight
            for number, layer in enumerate(self.layers)
            for option, branch in layer.others.items()
            for name, weight in branch.module.state_dict().items()
        }

    @torch.no_grad()
    def load_branch_state(self, state: dict[str, torch.Tensor]) -> None:
        """Set the branches' weights.

        Raises:
            KeyError: a weight is missing.
        """
        for name, weight in self.branch_state().items():
            weight.copy_(state[name])

    @torch.no_grad()
    def initialise(self, calibration: torch.Tensor) -> list[float]:
        """Start every branch from its attention, on `calibration` `[batch, time]` tokens of text.

        Returns the relative error of each layer's branch, `|M(h) - A(h)|^2 / |A(h)|^2`, right afterwards.
        """
        errors = []

        def start(layer: MorphableLayer, hidden: torch.Tensor, arguments: LayerArguments, output: torch.Tensor) -> None:
            for branch in layer.others.values():
                branch.mixer.initialise(branch.module, layer.branches[FULL].module, hidden, arguments)

        def measure(
            layer: MorphableLayer, hidden: torch.Tensor, arguments: LayerArguments, output: torch.Tensor
        ) -> None:
            for branch in layer.others.values():
                errors.append(relative_error(branch(hidden, arguments), output).item())

        self(calibration, observer=start)
        for option, mixer in self.host.mixers.items():
            mixer.settle([cast(Any, layer.branches[option]).module for layer in self.layers])
        self(calibration, observer=measure)
        return errors

    @torch.no_grad()
    def instantiate(self, plan: Plan, dtype: torch.dtype = torch.float32, shared: bool = False) -> PreTrainedModel:
        """The plan as a plain model of the host's class in `dtype`, with weights of its own; `shared`: with those of
        this model that have the dtype already.

        Raises:
            UserError: the plan is about another model, or an option that this host cannot hold.
        """
        space = self.space(plan.granularity)
        space.one_hot(plan)
        chosen = [plan.assignments[group] for group in space.groups]
        state = {name: weight for name, weight in self.model.state_dict().items() if ".branches." not in name}
        for layer, rows in zip(self.layers, space.layers, strict=True):
            states = {option: cast(Branch, branch).module.state_dict() for option, branch in layer.branches.items()}
            own = self.host.layer_state([chosen[row] for row in rows], states)
            state |= {layer_prefix(layer.number) + name: weight for name, weight in own.items()}
        config = self.host.with_plan(self.model.config, chosen)
        config.use_cache = True
        state = {name: weight.detach().to(dtype, copy=not shared) for name, weight in state.items()}
        model = empty_model(self.host, config, state)
        model.generation_config = self.model.generation_config
        return model.requires_grad_(True)


class _Resume(nn.Module):
    """Stands for the layers below one that a run starts with: gives what they gave before."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self._hidden = hidden

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self._hidden


def attach(model: PreTrainedModel, calibration: torch.Tensor) -> tuple[Morphable, list[float]]:
    """Give every attention of a host branches beside it, started from its weights; `model` itself is changed.

        model, proof = transplant(teacher)
        morphable, errors = attach(model, calibration)  # torch.Size([8, 256])

    Each attention of `model` is replaced by a `MorphableLayer` that holds it; all weights are frozen, `model` is in
    evaluation mode and its configuration has `use_cache` False. Without gates it computes what it did before.
    `build` makes a plain model again.

    Args:
        model: A host with all layers full, as `transplant` returns it.
        calibration: Tokens of text `[batch, time]`, some rows without padding.

    Returns:
        The morphable model, and for each layer in turn and each of its branches `|M(h) - A(h)|^2 / |A(h)|^2`: a branch
        without any output would have 1.

    Raises:
        UserError: `model` is no host.
    """
    morphable = Morphable(model)
    return morphable, morphable.initialise(calibration.to(morphable.device))


def build(morphable: Morphable, plan: Plan) -> PreTrainedModel:
    """The plan as a plain model of the host's class, in float32, with weights of its own that require gradients.

        hybrid = build(morphable, Space.of_layers(28).plan(["layers.6", "layers.20"], Budget("layers", 2)))

    `morphable` stays as it is. `Morphable.instantiate` builds in another dtype, or without copying weights.

    Raises:
        UserError: the plan is about another model, or an option that this host cannot hold.
    """
    return morphable.instantiate(plan)
