"""Parts of tensor-parallel weights on ranks of a fake process group, and models that cannot be cut up so."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.parts import create_tensor_file, write_rows
from sheeprlhf.engine.shard import cut_like, part_of, shard_module, tensor_plan
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.models import ARCHITECTURES, EXPERTS, FAMILIES
from tests.unit.engine.toy import NEEDS_FSDP2


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    options = (ARCHITECTURES | FAMILIES | EXPERTS)[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=258, pad_token_id=0, **options))


@NEEDS_FSDP2
def test_the_parts_of_all_ranks_are_the_whole_file(tmp_path: Path) -> None:
    """Qwen3 has norms of heads, whose gradients are partial; 258 rows are no multiple of 4 ranks."""
    whole = dict(tiny("qwen3").named_parameters())
    save_file({name: tensor.detach() for name, tensor in whole.items()}, tmp_path / "expected")
    create_tensor_file(tmp_path, "ours", whole)
    placements = set()
    for rank in range(4):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
            parameters = dict(shard_module(tiny("qwen3"), mesh).named_parameters())
            for name, parameter in parameters.items():
                part = part_of(parameter)
                assert part is not None and torch.equal(whole[name][part.place], part.local), name
                assert torch.equal(cut_like(whole[name].detach(), parameter).to_local(), part.local), name
            write_rows(make_fabric(FabricConfig()), tmp_path / "ours", whole, parameters)
            placements |= {parameter.placements for parameter in parameters.values()}
        finally:
            torch.distributed.destroy_process_group()
            _clear_sharding_prop_cache()  # it holds the mesh of this rank
    assert len(placements) == 3  # columns, rows, and weights that all processes share
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("llama", 4, "num_key_value_heads=2"),
        ("opt", 2, "model_type=opt"),
        ("olmo2", 2, "q_norm"),
        ("phi3", 2, "colwise_gather_output"),
        ("mixtral", 2, "moe_tp_experts"),
    ],
)
def test_models_that_cannot_be_cut_up(name: str, size: int, told: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError) as error:
        tensor_plan(tiny(name), size)
    assert f"fabric.tensor_parallel={size}" in str(error.value) and told in str(error.value)
