"""Where settings come from, which one wins, and what is said about wrong ones."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from heeler.config import MASK, environment_name, flag_name, load, secret_names
from heeler.errors import UsageError
from heeler.settings import Settings
from heeler.storage import stores


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(
    flags: dict[str, str] | None = None, environ: dict[str, str] | None = None, file: Path | None = None
) -> str:
    with pytest.raises(UsageError) as caught:
        load(flags or {}, environ or {}, file)
    return str(caught.value)


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", 'stop_grace = 3\ndebounce = 0.3\nretry_delay = 9\nsource = "local:/f"\n')
    environ = {"HEELER_STOP_GRACE": "2", "HEELER_DEBOUNCE": "0.2", "HEELER_SOURCE": ""}
    found = load({"stop_grace": "1"}, environ, file)
    settings = found.settings
    assert (settings.stop_grace, settings.debounce, settings.retry_delay) == (1.0, 0.2, 9.0)
    assert settings.source == "local:/f", "an empty variable is as good as none"
    assert settings.max_wait == 300.0
    assert found.origins["stop_grace"] == "flag --stop-grace"
    assert found.origins["debounce"] == "environment HEELER_DEBOUNCE"
    assert found.origins["retry_delay"] == f"file {file}"
    assert found.origins["max_wait"] == "default"


def test_the_file_is_the_one_named_else_the_one_in_the_environment_else_the_one_here(tmp_path: Path) -> None:
    write(tmp_path / "heeler.toml", "stop_grace = 1\n")
    other = write(tmp_path / "other.toml", "stop_grace = 2\n")
    third = write(tmp_path / "third.toml", "stop_grace = 3\n")
    assert load({}, {}).settings.stop_grace == 1
    assert load({}, {"HEELER_CONFIG": str(other)}).settings.stop_grace == 2
    assert load({}, {"HEELER_CONFIG": str(other)}, third).settings.stop_grace == 3


def test_every_kind_of_value_can_stand_in_a_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "f.toml",
        'scrub_env = true\nmax_jobs = 7\nretry_exit_codes = [75, 3]\ncontrol = "off"\nrestore_patience = 1234567.5\n',
    )
    settings = load({}, {}, file).settings
    assert settings.scrub_env is True
    assert settings.max_jobs == 7
    assert settings.retry_exit_codes == {75, 3}
    assert settings.control == "off"
    assert settings.restore_patience == 1234567.5


@pytest.mark.parametrize(
    ("name", "value", "setting", "expected"),
    [
        ("FILE_WATCHER_DEBOUNCE_MS", "250", "debounce", 0.25),
        ("FILE_WATCHER_STABILITY_CHECK_MS", "1500", "open_wait", 6.0),
        ("FILE_WATCHER_STABILITY_CHECK_MS", "50", "open_wait", 1.0),
        ("FILE_WATCHER_MAX_WAIT_MS", "60000", "max_wait", 60.0),
        ("INPUT_DIR", "/in", "input_dir", "/in"),
        ("CHECKPOINT_DIR", "/ck", "checkpoint_dir", "/ck"),
        ("OUTPUT_DIR", "/out", "output_dir", "/out"),
        ("AWS_ENDPOINT_URL_S3", "http://s3", "s3_endpoint", "http://s3"),
        ("R2_S3_ENDPOINT_URL", "http://r2", "s3_endpoint", "http://r2"),
        ("AWS_ENDPOINT_URL", "http://any", "s3_endpoint", "http://any"),
        ("AWS_DEFAULT_REGION", "eu-1", "s3_region", "eu-1"),
        ("AWS_ACCESS_KEY_ID", "AK", "s3_access_key_id", "AK"),
        ("R2_AWS_SECRET_ACCESS_KEY", "SK", "s3_secret_access_key", "SK"),
        ("AWS_SESSION_TOKEN", "ST", "s3_session_token", "ST"),
    ],
)
def test_names_of_others_are_honoured_in_their_own_units(name: str, value: str, setting: str, expected: object) -> None:
    found = load({}, {name: value})
    assert getattr(found.settings, setting) == expected
    assert found.origins[setting] == f"environment {name}"


def test_our_own_name_wins_over_an_alias_and_earlier_aliases_over_later_ones() -> None:
    environ = {
        "FILE_WATCHER_DEBOUNCE_MS": "250",
        "HEELER_DEBOUNCE": "2",
        "AWS_ENDPOINT_URL": "http://any",
        "R2_S3_ENDPOINT_URL": "http://r2",
    }
    settings = load({}, environ).settings
    assert settings.debounce == 2.0
    assert settings.s3_endpoint == "http://r2"


def test_an_unknown_name_in_the_environment_is_refused_with_the_nearest_known_one() -> None:
    assert "HEELER_STOP_GRACE" in refused(environ={"HEELER_STOPGRACE": "1"})
    words = refused(environ={"HEELER_XYZZY_QUUX": "1"})
    assert "HEELER_XYZZY_QUUX" in words
    assert "heeler config" in words


def test_what_a_job_is_told_does_not_trouble_a_heeler_that_it_starts() -> None:
    told = ("JOB_ID", "ATTEMPT", "INPUT_DIR", "CHECKPOINT_DIR", "OUTPUT_DIR", "PROCESS_TAG")
    load({}, {f"HEELER_{name}": "x" for name in told})


def test_other_programs_variables_are_none_of_our_business() -> None:
    load({}, {"HEELERX": "1", "PATH": "/bin", "heeler_source": "x"})


def test_an_unknown_key_in_the_file_is_refused_with_file_and_nearest_name(tmp_path: Path) -> None:
    file = write(tmp_path / "f.toml", "stop_grase = 1\n")
    words = refused(file=file)
    assert str(file) in words
    assert "stop_grase" in words
    assert "stop_grace" in words
    assert "sources" in refused(file=write(tmp_path / "g.toml", "[sources]\nx = 1\n"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_grace", "soon"),
        ("stop_grace", "-1"),
        ("stop_grace", "nan"),
        ("stop_grace", "inf"),
        ("max_jobs", "0"),
        ("max_jobs", "1.5"),
        ("scrub_env", "maybe"),
        ("when_done", "explode"),
        ("log_format", "xml"),
        ("retry_exit_codes", "0"),
        ("retry_exit_codes", "75,x"),
        ("retry_exit_codes", "256"),
        ("s3_provider", "gcs"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_that_was_used(name: str, value: str, tmp_path: Path) -> None:
    for words, origin in (
        (refused(flags={name: value}), flag_name(name)),
        (refused(environ={environment_name(name): value}), environment_name(name)),
        (refused(file=write(tmp_path / "f.toml", f'{name} = "{value}"\n')), f"f.toml: {name}"),
    ):
        assert origin in words
        assert repr(value) in words
        assert "must be" in words


def test_a_bad_alias_is_refused_by_its_own_name_and_unit() -> None:
    words = refused(environ={"FILE_WATCHER_DEBOUNCE_MS": "fast"})
    assert "FILE_WATCHER_DEBOUNCE_MS" in words
    assert "milliseconds" in words


def test_a_file_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    assert "missing.toml" in refused(file=tmp_path / "missing.toml")
    assert "missing.toml" in refused(environ={"HEELER_CONFIG": str(tmp_path / "missing.toml")})
    assert "not TOML" in refused(file=write(tmp_path / "bad.toml", "stop_grace = = 1\n"))
    (tmp_path / "latin.toml").write_bytes(b'source = "\xe9"\n')
    assert "latin.toml" in refused(file=tmp_path / "latin.toml")
    assert str(tmp_path) in refused(file=tmp_path)


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    environ = {"AWS_ACCESS_KEY_ID": "AKIA-visible", "AWS_SECRET_ACCESS_KEY": "s3cr3t", "AWS_SESSION_TOKEN": "t0ken"}
    found = load({}, environ)
    shown = "\n".join(map(str, found.table())) + repr(found) + repr(found.settings) + str(found.settings)
    for secret in environ.values():
        assert secret not in shown
    table = {name: value for name, value, _ in found.table()}
    assert table["s3_secret_access_key"] == MASK
    assert {name for name, _, _ in load({}, {}).table()} == {entry.name for entry in fields(Settings)}
    assert {name: value for name, value, _ in load({}, {}).table()}["s3_secret_access_key"] == ""
    assert found.secrets() == set(environ.values())


def test_all_names_of_credentials_are_known() -> None:
    names = secret_names()
    assert {
        "AWS_SECRET_ACCESS_KEY",
        "R2_AWS_SECRET_ACCESS_KEY",
        "HEELER_S3_SECRET_ACCESS_KEY",
        "KELPIE_API_KEY",
    } <= names
    assert "AWS_REGION" not in names


def test_the_state_folder_is_always_absolute() -> None:
    assert load({}, {}).settings.state_path.is_absolute()
    assert load({"state_dir": "x/y"}, {}).settings.state_path == Path.cwd() / "x/y"


KUBERNETES = {
    "HEELER_SERVICE_HOST": "10.0.0.1",
    "HEELER_SERVICE_PORT": "80",
    "HEELER_SERVICE_PORT_HTTP": "80",
    "HEELER_PORT": "tcp://10.0.0.1:80",
    "HEELER_PORT_80_TCP": "tcp://10.0.0.1:80",
    "HEELER_PORT_80_TCP_PROTO": "tcp",
    "HEELER_PORT_80_TCP_PORT": "80",
    "HEELER_PORT_80_TCP_ADDR": "10.0.0.1",
}


def test_what_kubernetes_tells_of_a_service_named_heeler_is_no_setting() -> None:
    load({}, KUBERNETES)
    for name in ("HEELER_SERVICE_HOSTS", "HEELER_PORTS", "HEELER_PORT_TCP", "HEELER_SERVICE", "HEELER_PORT_80_TCP_X"):
        assert f"{name} is no setting" in refused(environ={name: "x"})


def test_a_password_in_the_endpoint_is_refused_and_never_shown() -> None:
    for url in ("https://user:pass-w0rd@host", "https://user:pass-w0rd/x@host/y", "http://pass-w0rd@[bad"):
        found = load({}, {"AWS_ENDPOINT_URL_S3": url})
        assert "pass-w0rd" not in str(list(found.table()))
        with pytest.raises(UsageError, match="leave it out") as caught:
            stores(found.settings)
        assert "pass-w0rd" not in str(caught.value)
    stores(load({}, {"AWS_ENDPOINT_URL_S3": "https://host:8080"}).settings)


def test_the_storage_of_one_name_family_is_not_mixed_with_the_keys_of_another() -> None:
    """A queue on AWS with temporary credentials, and storage on R2 with its own."""
    environment = {
        "AWS_ENDPOINT_URL_S3": "https://s3.example",
        "AWS_ACCESS_KEY_ID": "queue-key",
        "AWS_SECRET_ACCESS_KEY": "queue-secret",
        "AWS_SESSION_TOKEN": "queue-token",
        "R2_S3_ENDPOINT_URL": "https://r2.example",
        "R2_AWS_ACCESS_KEY_ID": "r2-key",
        "R2_AWS_SECRET_ACCESS_KEY": "r2-secret",
    }
    found = load({}, environment).settings
    assert (found.s3_endpoint, found.s3_access_key_id) == ("https://r2.example", "r2-key")
    assert (found.s3_secret_access_key, found.s3_session_token) == ("r2-secret", None)
    aws = load({}, {name: value for name, value in environment.items() if name.startswith("AWS_")}).settings
    assert (aws.s3_endpoint, aws.s3_session_token) == ("https://s3.example", "queue-token")


def test_workers_with_a_state_file_of_kelpies_each_have_a_state_folder_and_a_port_of_their_own() -> None:
    files = ("/data/a.json", "/data/b.json", "/data/a.json")
    one, other, again = (load({}, {"KELPIE_STATE_FILE": name}).settings for name in files)
    plain = load({}, {}).settings
    assert one == again
    assert len({plain.state_dir, one.state_dir, other.state_dir}) == 3
    assert (plain.control, one.control) == ("127.0.0.1:8642", "127.0.0.1:0")
    given = load({"state_dir": "/own", "control": "off"}, {"KELPIE_STATE_FILE": "/data/a.json"}).settings
    assert (given.state_dir, given.control) == ("/own", "off")


def test_the_log_levels_of_kelpies_worker_are_known() -> None:
    found = {name: load({}, {"KELPIE_LOG_LEVEL": name}).settings.log_level for name in ("trace", "warn", "fatal")}
    assert found == {"trace": "debug", "warn": "warn", "fatal": "error"}
    with pytest.raises(UsageError, match=r"KELPIE_LOG_LEVEL is 'loud', but must be one of trace"):
        load({}, {"KELPIE_LOG_LEVEL": "loud"})
