"""The command of NVIDIA's fault-tolerance launcher, read back by the launcher's own parser."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.pipeline.executors.ft import RESTARTS, SAVE_S, SILENCE_S, START_S, ft_command


COMMAND = ("python", "-m", "nemo_upcycle.pipeline", "pretrain", "/runs/mine")


def _parsed(*arguments: Any, **options: Any) -> Any:
    from nvidia_resiliency_ext.fault_tolerance.launcher import config_from_args, parse_args

    words = ft_command(*arguments, **options)
    assert words[:3] == ("python", "-m", "nvidia_resiliency_ext.fault_tolerance.launcher")
    return config_from_args(parse_args(list(words[3:])))


def test_the_launcher_understands_every_option() -> None:
    config, program, arguments = _parsed(COMMAND, 64, 8, endpoint="node1:29500", job="17")
    assert (program, arguments) == (COMMAND[0], list(COMMAND[1:]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (64, 64, 8)
    assert (config.rdzv_endpoint, config.run_id, config.max_restarts) == ("node1:29500", "17", RESTARTS)
    assert config.term_timeout == SAVE_S
    timeouts = config.fault_tol_cfg
    assert (timeouts.initial_rank_heartbeat_timeout, timeouts.rank_heartbeat_timeout) == (START_S, SILENCE_S)


def test_one_node_needs_no_address() -> None:
    config, *_ = _parsed(COMMAND, 1, 2, silence_s=4.0)
    assert config.rdzv_endpoint == "localhost:0"
    assert config.fault_tol_cfg.rank_heartbeat_timeout == 4.0
