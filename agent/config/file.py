"""The configuration file and the flags, read and merged.

`--config FILE` takes YAML or JSON of one of these kinds:

- `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1), see agent.config.kube_proxy;
- `SliceproxyConfiguration` (sliceproxy/v1), with a field for every option of
  agent.config.settings;
- `ConfigMap`, as kubeadm leaves it in kube-system, with one of these two under `config.conf`.

A mistake is an error, one line that names the file, the field and what is allowed: an unknown
field, a duplicate field (YAML parsers silently keep the last one), a value of the wrong type or
out of range. Flags override the file: see `merged`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.config import kube_proxy
from agent.config.checks import Check, ConfigError
from agent.config.durations import Duration, decode_duration, parse_duration
from agent.config.settings import OPTIONS, Settings

KUBE_PROXY = ("KubeProxyConfiguration", "kubeproxy.config.k8s.io/v1alpha1")
OWN = ("SliceproxyConfiguration", "sliceproxy/v1")
CONFIG_MAP_KEYS = ("config.conf", "config.yaml")


class ConfigFile(msgspec.Struct, frozen=True):
    """What a file chooses.

    `chosen` maps names of options to values. `honoured` lists the file's fields that they are
    from, `without_meaning` those that ask for something that does not apply, each with the reason.
    """

    path: str
    chosen: dict[str, Any]
    honoured: tuple[str, ...] = ()
    without_meaning: tuple[str, ...] = ()


def read(path: str | Path) -> ConfigFile:
    """Reads a configuration file. Raises ConfigError, one line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return parse(data, str(path))


def parse(data: bytes | str, where: str) -> ConfigFile:
    """The contents of a configuration file; `where` names it. Raises ConfigError, one line."""
    document = _load(data, where)
    if document.get("kind") == "ConfigMap":
        document, where = _unwrap(document, where)
    kind, version = document.pop("kind", None), document.pop("apiVersion", None)
    for known, reader in ((KUBE_PROXY, _kube_proxy), (OWN, _own)):
        if kind == known[0]:
            if version != known[1]:
                raise ConfigError(f"{where}: apiVersion: {version!r}; use {known[1]}")
            return reader(document, where)
    raise ConfigError(f"{where}: kind: {kind!r}; use {KUBE_PROXY[0]}, {OWN[0]} or ConfigMap")


def _load(data: bytes | str, where: str) -> dict[str, Any]:
    import yaml  # 12 ms and 1 MB, which an agent without a file saves

    class Loader(yaml.CSafeLoader):
        """Refuses a duplicate key, as the YAML specification demands."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is duplicate", key.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        documents = [d for d in yaml.load_all(data, Loader=Loader) if d is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{where}: {line}{problem}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is not text in UTF-8") from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(f"{where}: must hold one YAML or JSON object, the configuration")
    return dict(documents[0])


def _unwrap(config_map: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    data = config_map.get("data")
    for key in CONFIG_MAP_KEYS:
        text = data.get(key) if isinstance(data, dict) else None
        if isinstance(text, str):
            inside = f"{where}: data[{key}]"
            return _load(text, inside), inside
    raise ConfigError(f"{where}: data: the ConfigMap has no {' or '.join(CONFIG_MAP_KEYS)}")


_T = TypeVar("_T")
_AT = re.compile(r"(?s)(.*?)(?: - at `\$\.?(.*)`)?")


def _convert(document: dict[str, Any], kind: type[_T], where: str) -> _T:
    try:
        return msgspec.convert(document, kind, dec_hook=decode_duration)
    except msgspec.ValidationError as error:
        match = _AT.fullmatch(str(error))
        problem, path = (match[1], match[2] or "") if match else (str(error), "")
        unknown = re.fullmatch("Object contains unknown field `(.*)`", problem)
        if unknown:
            path, problem = _unknown(kind, path, unknown[1])
        elif problem.startswith("Expected"):
            problem = problem[0].lower() + problem[1:].replace("`", "").replace(" | null", "")
        raise ConfigError(f"{where}: {path + ': ' if path else ''}{problem}") from None


def _unknown(kind: type, parent: str, name: str) -> tuple[str, str]:
    """Path and description of an unknown field, with the name that was perhaps meant."""
    if kind is Settings:
        known = {declared.field for declared in OPTIONS.values()}
    else:
        known = kube_proxy.known_below(parent)
    near = difflib.get_close_matches(name, known, 1)
    allowed = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    return f"{parent}.{name}" if parent else name, f"unknown field; {allowed}"


def _kube_proxy(document: dict[str, Any], where: str) -> ConfigFile:
    values = kube_proxy.field_values(_convert(document, kube_proxy.Shape, where))
    for field in kube_proxy.FIELDS:
        _verify(field.check, values[field.path], f"{where}: {field.path}")
    return ConfigFile(where, *kube_proxy.meaning(values))


def _own(document: dict[str, Any], where: str) -> ConfigFile:
    given = {name: value for name, value in document.items() if value is not None}
    settings = _convert(given, Settings, where)
    chosen = {
        name: getattr(settings, name)
        for name, declared in OPTIONS.items()
        if declared.field in given
    }
    for name, value in chosen.items():
        _verify(OPTIONS[name].check, value, f"{where}: {OPTIONS[name].field}")
    return ConfigFile(where, chosen, tuple(given))


def _verify(check: Check | None, value: object, where: str) -> None:
    if check is None or value is None:
        return
    try:
        check(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def merged(file: ConfigFile | None, flags: Mapping[str, Any]) -> Settings:
    """The settings: flags before the file before the defaults. Raises ConfigError.

    `flags` holds the flags that were *given*, by name of the option; durations may be text.
    """
    given = {name: _flag(name, value) for name, value in flags.items()}
    settings = Settings(**{**(file.chosen if file else {}), **given})
    try:
        settings.options()
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}" if file else str(error)) from None
    return settings


def _flag(name: str, value: Any) -> Any:
    declared = OPTIONS[name]
    if declared.type is Duration and isinstance(value, str):
        try:
            value = parse_duration(value)
        except ValueError as error:
            raise ConfigError(f"{declared.flag}: {error}") from None
    _verify(declared.check, value, declared.flag)
    return value
