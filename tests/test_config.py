"""Settings: found, checked when built, and never showing a password or secret."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from millstream.config import (
    ADVERT,
    IGNORED_OPTIONS,
    PUBLIC_KEY,
    AutoscalingConfig,
    DeploymentConfig,
    Settings,
    find_settings,
    parse_secret,
    read_advert,
    redact,
)
from millstream.errors import BrokerUnavailableError, ConfigError

URL = "redis://user:hunter2@example.org:6379/3"


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("URL", "NAMESPACE", "SECRET_KEY", "STRICT", "STATE"):
        monkeypatch.delenv(f"MILLSTREAM_{name}", raising=False)
    monkeypatch.chdir(tmp_path)


def advertise(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADVERT).write_text(json.dumps({"url": "redis://:pw@127.0.0.1:7000", "secret_key": "ab" * 16, **fields}))


# Settings


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost", "rediss://:pw@example.org:1/2", "unix:///tmp/socket?db=1",
        "redis+cluster://a:1,b:2", "rediss+cluster://me:p,w@a:1,b:2/0?ssl_cert_reqs=none",
    ],
)  # fmt: skip
def test_redis_urls_are_accepted(url: str) -> None:
    assert Settings(url).url == url


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://user:hunter2@localhost"])
def test_other_urls_are_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a Redis URL") as caught:
        Settings(url)

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("namespace", ["", "a:b", "{a}", "a b", "a.b", "a~b", "*"])
def test_namespace_that_would_break_keys_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigError, match="namespace"):
        Settings(URL, namespace=namespace)


@pytest.mark.parametrize("secret", [b"", b"x" * 65])
def test_secret_of_an_unusable_length_is_refused_unseen(secret: bytes) -> None:
    with pytest.raises(ConfigError, match=f"secret_key has {len(secret)} bytes") as caught:
        Settings(URL, secret_key=secret)

    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize("lease_s", [0.5, 7200, float("nan"), True, "5"])
def test_lease_of_an_unusable_length_is_refused(lease_s: Any) -> None:
    with pytest.raises(ConfigError, match="must be a number of seconds, from 1 to 3600"):
        Settings(URL, lease_s=lease_s)


def test_lease_of_the_environment_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_LEASE_S", "soon")

    with pytest.raises(ConfigError, match="MILLSTREAM_LEASE_S='soon' must be a number of seconds"):
        find_settings(URL)


def test_repr_hides_password_and_secret() -> None:
    text = repr(Settings(URL, secret_key=b"top secret"))

    assert "hunter2" not in text and "top secret" not in text
    assert "example.org" in text


def test_child_process_finds_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in (Settings(URL, "other", b"\x00\xff secret", lease_s=1.5), Settings(URL)):
        for name, value in settings.to_environment().items():
            monkeypatch.setenv(name, value)

        assert find_settings() == settings


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "redis://***@example.org:6379/3"),
        ("redis://:p@ss@host", "redis://***@host"),
        ("redis://host:1/0", "redis://host:1/0"),
        ("unix:///tmp/socket", "unix:///tmp/socket"),
        ("rediss://host?ssl_password=pw&db=1", "rediss://host?ssl_password=***&db=1"),
    ],
)
def test_redacted_url_names_the_server_only(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (None, PUBLIC_KEY),
        ("", PUBLIC_KEY),
        ("00ff", b"\x00\xff"),
        ("a pass phrase", b"a pass phrase"),
        (b"raw", b"raw"),
    ],
)
def test_secret_is_read_as_a_person_writes_it(text: str | bytes | None, secret: bytes) -> None:
    assert parse_secret(text) == secret


# find_settings


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_URL", "redis://environment")
    monkeypatch.setenv("MILLSTREAM_NAMESPACE", "environment")
    monkeypatch.setenv("MILLSTREAM_SECRET_KEY", "environment")

    found = find_settings("redis://argument", namespace="argument", secret_key="argument")

    assert found == Settings("redis://argument", "argument", b"argument")


def test_environment_wins_over_the_advertised_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    advertise(tmp_path / ".millstream")
    monkeypatch.setenv("MILLSTREAM_URL", "redis://environment")

    found = find_settings()

    assert (found.url, found.is_public) == ("redis://environment", True)


def test_server_advertised_in_the_working_folder_is_found_with_its_secret(tmp_path: Path) -> None:
    advertise(tmp_path / ".millstream")

    found = find_settings()

    assert found == Settings("redis://:pw@127.0.0.1:7000", secret_key=b"\xab" * 16)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_state_folder_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str) -> None:
    advertise(tmp_path / "elsewhere")
    monkeypatch.setenv("MILLSTREAM_STATE", str(tmp_path / ("elsewhere" if by == "environment" else "nowhere")))

    found = find_settings(state=tmp_path / "elsewhere" if by == "argument" else None)

    assert found.url == "redis://:pw@127.0.0.1:7000"


def test_no_server_anywhere_says_how_to_start_one() -> None:
    with pytest.raises(BrokerUnavailableError, match="millstream run"):
        find_settings()


def test_advert_that_is_damaged_says_which_file(tmp_path: Path) -> None:
    (tmp_path / ADVERT).write_text("{half")

    with pytest.raises(ConfigError, match=r"server\.json is not readable JSON"):
        read_advert(tmp_path)


def test_state_folder_that_is_a_file_advertises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert read_advert(tmp_path / "file") is None


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_strict_refuses_to_run_without_a_secret(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setenv("MILLSTREAM_STRICT", "1" if by == "environment" else "0")

    with pytest.raises(ConfigError, match="no secret is set"):
        find_settings(URL, strict=True if by == "argument" else None)
    assert find_settings(URL, secret_key="one", strict=True).secret_key == b"one"


@pytest.mark.parametrize("value", ["", "0"])
def test_strict_can_be_switched_off_in_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MILLSTREAM_STRICT", value)

    assert find_settings(URL).is_public


# DeploymentConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_replicas": 0},
        {"autoscaling_config": {"min_replicas": 0, "max_replicas": 10, "downscale_to_zero_delay_s": 5.0}},
        {"max_ongoing_requests": 7, "user_config": {"threshold": [1, 2]}, "start_method": "spawn", "result_ttl_s": 2.5},
        {"max_queued_requests": 7, "request_timeout_s": 2.5},
    ],
)
def test_config_survives_json_and_pickle(options: dict[str, Any]) -> None:
    config = DeploymentConfig().updated(options)

    assert DeploymentConfig.from_json(config.to_json()) == config
    assert DeploymentConfig.from_json(config.to_json().encode()) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_replicas", -1), ("num_replicas", 1.5), ("num_replicas", True), ("num_replicas", "two"),
        ("max_ongoing_requests", 0), ("sync_threads", 0), ("max_attempts", 0), ("result_ttl_s", 0.5),
        ("result_ttl_s", float("inf")), ("result_ttl_s", float("nan")), ("health_check_timeout_s", 0),
        ("graceful_shutdown_timeout_s", -1), ("start_method", "thread"), ("health_check_period_s", 0), ("version", 2),
        ("max_queued_requests", 0), ("max_queued_requests", -2), ("max_queued_requests", 1.5),
        ("max_queued_requests", True), ("request_timeout_s", 0), ("request_timeout_s", -1),
        ("request_timeout_s", 0.0001), ("request_timeout_s", float("inf")), ("request_timeout_s", "soon"),
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r}") as caught:
        DeploymentConfig().updated({name: value})

    assert isinstance(caught.value, ValueError)


def test_unknown_option_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'max_concurency'; known are .*max_ongoing_requests"):
        DeploymentConfig().updated({"max_concurency": 3})


@pytest.mark.parametrize("name", sorted(IGNORED_OPTIONS))
def test_options_without_meaning_here_are_accepted_and_change_nothing(name: str) -> None:
    assert DeploymentConfig().updated({name: "anything"}) == DeploymentConfig()


def test_former_name_of_max_ongoing_requests_still_works() -> None:
    assert DeploymentConfig().updated({"max_concurrent_queries": 5}).max_ongoing_requests == 5


@pytest.mark.parametrize("value", [-1, None])
def test_queue_without_a_limit_is_named_in_rays_way_and_in_ours(value: int | None) -> None:
    limited = DeploymentConfig().updated({"max_queued_requests": 5})

    assert limited.updated({"max_queued_requests": value}).max_queued_requests is None


def test_deployment_has_neither_limit_nor_timeout_unless_told() -> None:
    config = DeploymentConfig()

    assert (config.max_queued_requests, config.request_timeout_s) == (None, None)


def test_config_that_an_older_version_stored_is_read() -> None:
    """Handles and replicas of two versions share a server while one replaces the other."""
    stored = json.loads(DeploymentConfig().to_json())
    del stored["max_queued_requests"], stored["request_timeout_s"]

    assert DeploymentConfig.from_json(json.dumps(stored)) == DeploymentConfig()


def test_options_build_on_what_was_set_before() -> None:
    config = DeploymentConfig().updated({"max_attempts": 1, "sync_threads": 4})

    assert config.updated({"sync_threads": 2}) == DeploymentConfig(max_attempts=1, sync_threads=2)


@pytest.mark.parametrize("name", ["resources", "ray_actor_options"])
def test_resources_go_by_rays_name_too(name: str) -> None:
    config = DeploymentConfig().updated({name: {"num_cpus": 2, "num_gpus": 0.5}})

    assert config.resources == {"num_cpus": 2, "num_gpus": 0.5}
    assert DeploymentConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"resources": {"num_gpus": -1}}, r"resources\['num_gpus'\]=-1 must be a number"),
        ({"resources": {"num_cpus": "many"}}, r"resources\['num_cpus'\]='many' must be a number"),
        ({"resources": {"num_cpus": True}}, r"resources\['num_cpus'\]=True must be a number"),
        ({"ray_actor_options": {"memory": 1}}, "has 'memory', which means nothing here; known are num_cpus, num_gpus"),
        ({"resources": 3}, "resources=3 must be a dict"),
        ({"resources": {}, "ray_actor_options": {}}, "are two names for one thing; drop one"),
    ],
)
def test_resources_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        DeploymentConfig().updated(options)


# replicas, fixed or scaled


def test_auto_is_one_to_a_hundred_replicas() -> None:
    config = DeploymentConfig().updated({"num_replicas": "auto"})

    assert config.autoscaling == AutoscalingConfig(min_replicas=1, max_replicas=100)
    assert config.autoscaling.target_ongoing_requests == 2


def test_auto_with_a_config_takes_the_rest_from_it() -> None:
    config = DeploymentConfig().updated({"num_replicas": "auto", "autoscaling_config": {"max_replicas": 5}})

    assert config.autoscaling == AutoscalingConfig(min_replicas=1, max_replicas=5)


def test_autoscaling_config_may_be_a_value() -> None:
    scaling = AutoscalingConfig(min_replicas=2, max_replicas=3)

    assert DeploymentConfig().updated({"autoscaling_config": scaling}).autoscaling == scaling


def test_former_names_of_autoscaling_fields_still_work() -> None:
    former = {
        "target_num_ongoing_requests_per_replica": 5,
        "smoothing_factor": 0.5,
        "upscale_smoothing_factor": 2.0,
        "metrics_interval_s": 10,
        "downscaling_factor": None,
    }

    scaling = DeploymentConfig().updated({"autoscaling_config": former}).autoscaling

    assert scaling == AutoscalingConfig(target_ongoing_requests=5, upscaling_factor=2.0, downscaling_factor=0.5)


def test_fixed_number_ends_autoscaling() -> None:
    config = DeploymentConfig().updated({"num_replicas": "auto"}).updated({"num_replicas": 3})

    assert (config.num_replicas, config.autoscaling) == (3, None)


def test_fixed_number_and_autoscaling_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="num_replicas=3 and autoscaling_config exclude each other"):
        DeploymentConfig().updated({"num_replicas": 3, "autoscaling_config": {"max_replicas": 5}})


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"min_replicas": 5, "max_replicas": 4}, "max_replicas=4 is below min_replicas=5"),
        ({"min_replicas": 1, "max_replicas": 4, "initial_replicas": 5}, "initial_replicas=5 is outside min_replicas=1"),
        ({"min_replicas": -1}, "min_replicas=-1 must be at least 0"),
        ({"max_replicas": 0}, "max_replicas=0 must be at least 1"),
        ({"max_replicas": 2.5}, "max_replicas=2.5 must be a whole number"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests=0 must be above 0"),
        ({"downscale_delay_s": -1}, "downscale_delay_s=-1 must be at least 0"),
        ({"downscale_to_zero_delay_s": -1}, "downscale_to_zero_delay_s=-1 must be at least 0"),
        ({"upscaling_factor": 0}, "upscaling_factor=0 must be above 0"),
        ({"policy": "magic"}, "policy='magic' is unknown"),
        ({"max_replica": 3}, "unknown option 'max_replica'"),
    ],
)
def test_autoscaling_that_contradicts_itself_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        DeploymentConfig().updated({"autoscaling_config": fields})


def test_scaling_to_zero_waits_as_long_as_any_scaling_down_unless_told_otherwise() -> None:
    assert AutoscalingConfig(downscale_delay_s=7).to_zero_delay_s == 7
    assert AutoscalingConfig(downscale_delay_s=7, downscale_to_zero_delay_s=0).to_zero_delay_s == 0


def test_autoscaling_config_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a dict or AutoscalingConfig, not list"):
        DeploymentConfig().updated({"autoscaling_config": [1, 2]})
