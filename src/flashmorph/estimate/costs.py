"""Costs of layers and heads by arithmetic: what each option reads for one token, at a GPU's rate of reading memory."""

from flashmorph.devices import dtype_name
from flashmorph.errors import UserError
from flashmorph.estimate.estimate import Estimate
from flashmorph.hosts import layer_space, shape_of
from flashmorph.plan import FULL, Budget, Costs


def estimated_costs(estimate: Estimate, context: int) -> Costs:
    """The costs of a token after `context` others on the estimate's GPU, as `Estimate.seconds_per_token` has them.

    A group reads the weights of its mixer and its cache once; every plan reads the rest of the weights. A head is that
    share of its layer. What a kernel's launch takes is not in it.

    Raises:
        UserError: the estimate is about no GPU, or about several.
    """
    if not estimate.gpu or estimate.num_gpus > 1:
        raise UserError("costs are those of one GPU: name it, for example --gpu h100, and leave --gpus out")
    model, gpu, host = estimate.model, estimate.gpu, estimate.model.host
    space = layer_space(host, model.config, Budget("heads" if host.by_head else "layers", 1))
    of_a_layer = model.layers / len(space.groups)

    def seconds(option: str) -> float:
        weights = estimate.weight_bytes(estimate.sizes.parts[option].parameters)
        cache = host.mixers[option].cache_bytes(model.config, context)
        return of_a_layer * (weights + cache) / gpu.bandwidth

    cache = model.layers * host.mixers[FULL].cache_bytes(model.config, context)
    whole = estimate.seconds_per_token(estimate.sizes.host, cache)
    assert whole is not None
    dtype = dtype_name(model.config.dtype)
    return Costs.of_seconds(
        whole,
        {option: seconds(option) - seconds(FULL) for option in host.mixers},
        space.groups,
        teacher=estimate.teacher,
        host=host.name,
        shape=shape_of(host, model.config),
        context=context,
        source={"kind": "estimated", "device": gpu.name, "dtype": dtype},
    )
