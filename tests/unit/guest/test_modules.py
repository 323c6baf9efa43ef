from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.errors import InvalidConfigError, UnsupportedError
from casemate.guest import elf, modules
from casemate.guest.modules import ModuleSet, ModuleTree
from tests.support.guest_files import make_module

DEP = """\
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko.xz: kernel/drivers/virtio/virtio.ko.xz
updates/overlay.ko:
kernel/fs/overlayfs/overlay.ko:
"""


def _tree(depends: Mapping[str, tuple[str, ...]], builtin: tuple[str, ...] = ()) -> ModuleTree:
    return ModuleTree(
        release="6.1-test",
        paths={name: f"kernel/{name}.ko" for name in depends},
        builtin=frozenset(builtin),
        depends=depends.__getitem__,
    )


def _names(planned: tuple[modules.PlannedModule, ...]) -> list[str]:
    return [module.name for module in planned]


def test_parse_modules_dep_of_dashes_and_updates_gives_normal_names_and_the_first_path() -> None:
    assert modules.parse_modules_dep(DEP) == {
        "virtio": "kernel/drivers/virtio/virtio.ko",
        "virtio_rng": "kernel/drivers/char/hw_random/virtio-rng.ko.xz",
        "overlay": "updates/overlay.ko",
    }


def test_parse_builtin_gives_normal_names() -> None:
    assert modules.parse_builtin("kernel/fs/ext4/ext4.ko\nkernel/x/virtio-iommu.ko\n\n") == {
        "ext4",
        "virtio_iommu",
    }


def test_parse_config_ignores_what_is_not_set() -> None:
    text = '# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C="x=y"\n'

    assert modules.parse_config(text) == {"CONFIG_B": "y", "CONFIG_C": '"x=y"'}


def test_plan_modules_puts_each_after_what_it_needs() -> None:
    tree = _tree(
        {
            "ring": (),
            "virtio": ("ring",),
            "pci": ("virtio", "ring"),
            "vsock": (),
            "transport": ("vsock", "virtio"),
        }
    )

    plan = modules.plan_modules(ModuleSet(("pci", "transport"), (), ()), tree)

    assert _names(plan.boot) == ["ring", "virtio", "pci", "vsock", "transport"]
    assert plan.boot[-1].depends == ("vsock.ko", "virtio.ko")


def test_plan_modules_when_built_in_leaves_out_module_and_dependency() -> None:
    tree = _tree({"transport": ("vsock", "virtio"), "vsock": ()}, builtin=("virtio", "virtio_pci"))

    plan = modules.plan_modules(ModuleSet(("virtio_pci", "transport"), (), ()), tree)

    assert [(module.name, module.depends) for module in plan.boot] == [
        ("vsock", ()),
        ("transport", ("vsock.ko",)),
    ]


def test_plan_modules_gives_each_module_to_the_first_stage_that_needs_it() -> None:
    tree = _tree(
        {"virtio": (), "vsock": ("virtio",), "blk": ("virtio",), "net": ("failover",), "failover": ()}
    )

    plan = modules.plan_modules(ModuleSet(("vsock",), ("blk",), ("net", "blk")), tree)

    assert (_names(plan.boot), _names(plan.rootfs), _names(plan.demand)) == (
        ["virtio", "vsock"],
        ["blk"],
        ["failover", "net"],
    )


def test_plan_modules_when_needed_ones_are_missing_names_them_all() -> None:
    with pytest.raises(UnsupportedError, match=r"6\.1-test lacks erofs, overlay") as caught:
        modules.plan_modules(ModuleSet(("a",), ("erofs", "overlay"), ()), _tree({"a": ()}))
    assert caught.value.capability == "erofs, overlay"


def test_plan_modules_when_one_on_demand_is_missing_goes_on() -> None:
    plan = modules.plan_modules(ModuleSet(("a",), (), ("virtiofs",)), _tree({"a": ()}))

    assert plan.demand == ()


def test_plan_modules_when_a_dependency_is_missing_raises() -> None:
    with pytest.raises(InvalidConfigError, match=r"module a of kernel 6\.1-test needs b, which is not there"):
        modules.plan_modules(ModuleSet(("a",), (), ()), _tree({"a": ("b",)}))


def test_plan_modules_when_a_soft_dependency_is_missing_goes_on() -> None:
    plan = modules.plan_modules(ModuleSet(("a",), (), ()), _tree({"a": ("?crc32c", "?b"), "b": ()}))

    assert _names(plan.boot) == ["b", "a"]


def test_plan_modules_when_modules_need_each_other_raises() -> None:
    with pytest.raises(InvalidConfigError, match="a -> b -> a"):
        modules.plan_modules(ModuleSet(("a",), (), ()), _tree({"a": ("b",), "b": ("a",)}))


@given(st.dictionaries(st.integers(0, 12), st.sets(st.integers(0, 12), max_size=4), min_size=1))
def test_plan_modules_of_any_acyclic_tree_is_closed_and_in_order(edges: dict[int, set[int]]) -> None:
    depends = {
        f"m{n}": tuple(f"m{low}" for low in sorted(lows) if low < n and low in edges)
        for n, lows in edges.items()
    }

    plan = modules.plan_modules(ModuleSet(tuple(depends), (), ()), _tree(depends))

    seen: set[str] = set()
    for module in plan.all:
        assert set(module.depends) == {f"{name}.ko" for name in depends[module.name]}
        assert set(module.depends) <= seen
        seen.add(module.file_name)
    assert seen == {f"{name}.ko" for name in depends}


@pytest.mark.parametrize("machine", ["q35", "microvm"])
def test_module_set_of_machine_has_vsock_first_and_bus(machine: str) -> None:
    wanted = modules.module_set(machine)

    assert wanted.boot == (
        {"q35": "virtio_pci", "microvm": "virtio_mmio"}[machine],
        "vmw_vsock_virtio_transport",
    )
    assert set(wanted.boot + wanted.rootfs) == set(modules.MODULE_OPTIONS) - {
        {"q35": "virtio_mmio", "microvm": "virtio_pci"}[machine]
    }


def test_module_set_of_unknown_machine_lists_known_ones() -> None:
    with pytest.raises(InvalidConfigError, match="microvm, q35"):
        modules.module_set("pc")


def test_parse_modinfo_reads_dependencies_hard_and_soft() -> None:
    module = make_module("x", "virtio,virtio_ring", softdep="pre: crc32c foo post: bar")

    assert modules.parse_modinfo(module) == ("virtio", "virtio_ring", "?crc32c", "?foo")


def test_trim_module_takes_signature_and_hides_type_information() -> None:
    module = make_module("x", "y")

    trimmed = modules.trim_module(module)

    assert trimmed == make_module("x", "y", signed=False).replace(b".BTF\0", b".btf\0")
    assert modules.parse_modinfo(trimmed) == ("y",)


def test_trim_module_of_unsigned_module_keeps_its_length() -> None:
    module = make_module("x", signed=False)

    assert len(modules.trim_module(module)) == len(module)


def test_trim_module_when_signature_is_longer_than_module_raises() -> None:
    with pytest.raises(elf.ElfError, match="signature of 4294967295 bytes"):
        modules.trim_module(b"\x7fELF" + b"\xff" * 12 + b"~Module signature appended~\n")
