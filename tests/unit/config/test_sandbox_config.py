from __future__ import annotations

from typing import Any

import msgspec
import pytest

from casemate.config.sandbox import SandboxConfig, TimeoutConfig, check_host
from casemate.errors import InvalidConfigError


def test_sandbox_config_when_empty_then_has_usable_defaults() -> None:
    config = SandboxConfig()

    assert (config.hypervisor, config.machine, config.accel, config.vcpus) == ("qemu", "q35", "auto", 1)
    assert config.root_ports == 4
    assert SandboxConfig(machine="microvm").root_ports == 0


@pytest.mark.parametrize(
    ("document", "path", "text"),
    [
        ({"vcpus": 0}, "vcpus", "1 to 288 vCPUs are possible; the nearest is 1"),
        ({"vcpus": 10_000}, "vcpus", "1 to 288 vCPUs are possible; the nearest is 288"),
        ({"vcpus": "2"}, "vcpus", "expected `int`, got `str`"),
        ({"vcpus": 4, "max_vcpus": 2}, "max_vcpus", "the nearest is 4"),
        ({"memory_mib": 16}, "memory_mib", "the nearest is 64"),
        ({"memory_mib": -1}, "memory_mib", "the nearest is 64"),
        ({"memory_mib": 256, "max_memory_mib": 128}, "max_memory_mib", "the nearest is 256"),
        ({"machine": "pc"}, "machine", "'q35', 'microvm' are possible"),
        ({"machine": "microvn"}, "machine", "did you mean 'microvm'?"),
        ({"hypervisor": "xen"}, "hypervisor", "'qemu'"),
        ({"accel": "hvf"}, "accel", "'auto', 'kvm', 'tcg'"),
        ({"name": "a"}, "name", "2 to 64"),
        ({"name": "../etc"}, "name", "as 'etc'"),
        ({"name": "x" * 65}, "name", "2 to 64"),
        ({"name": ""}, "name", "2 to 64"),
        ({"name": "web\n"}, "name", "2 to 64"),
        ({"hostname": "-x"}, "hostname", "labels"),
        ({"kernel": ""}, "kernel", "is empty"),
        ({"kernel": "/a\0b"}, "kernel", "NUL"),
        ({"initrd": "/i", "image": "/d"}, "image", "leave one out"),
        ({"machine": "microvm", "hotplug_ports": 2}, "hotplug_ports", "machine 'q35'"),
        ({"hotplug_ports": 17}, "hotplug_ports", "the nearest is 16"),
        ({"machine": "microvm", "hotplug_bridges": 1}, "hotplug_bridges", "machine 'q35'"),
        ({"hotplug_bridges": 6}, "hotplug_bridges", "the nearest is 5"),
        ({"hotplug_ports": 13, "hotplug_bridges": 4}, "hotplug_bridges", "the nearest is 3"),
        ({"machine": "microvm", "max_vcpus": 2}, "max_vcpus", "can't grow"),
        ({"machine": "microvm", "max_memory_mib": 1024}, "max_memory_mib", "can't grow"),
        ({"cpu_model": "host max"}, "cpu_model", "without spaces"),
        ({"kernel_parameters": ["a", "b c"]}, "kernel_parameters[1]", "['b', 'c']"),
        ({"kernel_parameters": ['a="b']}, "kernel_parameters[0]", "double quotes"),
        ({"kernel_parameters": [""]}, "kernel_parameters[0]", "empty"),
        ({"kernel_parameters": ["a", 1]}, "kernel_parameters[1]", "expected `str`"),
        ({"timeouts": {"boot_s": 0}}, "timeouts.boot_s", "above 0"),
        ({"timeouts": {"boots": 1}}, "timeouts.boots", "did you mean 'boot_s'?"),
        ({"vcpu": 1}, "vcpu", "did you mean 'vcpus'?"),
    ],
)
def test_sandbox_config_when_document_is_bad_then_names_path_and_nearest(
    document: dict[str, Any], path: str, text: str
) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        SandboxConfig.from_document(document)

    assert caught.value.path == path
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"vcpus": 0}, "vcpus"),
        ({"vcpus": "2"}, "vcpus"),
        ({"vcpus": True}, "vcpus"),
        ({"qemu_arguments": "-S -x"}, "qemu_arguments"),
    ],
)
def test_sandbox_config_when_constructed_badly_then_checks_too(arguments: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        SandboxConfig(**arguments)

    assert caught.value.path == path


def test_sandbox_config_when_converted_to_document_and_back_then_is_equal() -> None:
    config = SandboxConfig(
        name="web-1", vcpus=2, kernel_parameters=["a=b", 'x="y z"'], timeouts=TimeoutConfig(boot_s=5)
    )

    assert SandboxConfig.from_document(msgspec.to_builtins(config)) == config
    assert config.kernel_parameters == ("a=b", 'x="y z"')


def test_timeouts_when_scaled_then_each_is_multiplied() -> None:
    scaled = TimeoutConfig(boot_s=10, stop_s=2).scaled(3)

    assert (scaled.boot_s, scaled.stop_s, scaled.request_s) == (30, 6, 90)


def test_check_host_when_memory_exceeds_it_then_names_the_hosts() -> None:
    check_host(SandboxConfig(memory_mib=4096), memory_mib=4096)
    with pytest.raises(InvalidConfigError, match="the host has 4096 MiB") as caught:
        check_host(SandboxConfig(memory_mib=4097), memory_mib=4096)

    assert caught.value.path == "memory_mib"
