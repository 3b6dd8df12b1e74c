"""What the Hub asks of the YAML of a card, as far as its documentation says, for servers in tests."""

from __future__ import annotations

import re

import yaml

# https://huggingface.co/docs/hub/repositories-licenses
LICENCES = {
    "apache-2.0",
    "mit",
    "openrail",
    "bigscience-openrail-m",
    "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m",
    "afl-3.0",
    "artistic-2.0",
    "bsl-1.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-3-clause-clear",
    "c-uda",
    "cc",
    "cc0-1.0",
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "cc-by-nc-2.0",
    "cc-by-nc-3.0",
    "cc-by-nc-4.0",
    "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0",
    "cdla-permissive-1.0",
    "cdla-permissive-2.0",
    "wtfpl",
    "ecl-2.0",
    "epl-1.0",
    "epl-2.0",
    "etalab-2.0",
    "eupl-1.1",
    "eupl-1.2",
    "agpl-3.0",
    "gfdl",
    "gpl",
    "gpl-2.0",
    "gpl-3.0",
    "lgpl",
    "lgpl-2.1",
    "lgpl-3.0",
    "isc",
    "intel-research",
    "mpl-2.0",
    "ms-pl",
    "odc-by",
    "odbl",
    "openrail++",
    "osl-3.0",
    "postgresql",
    "ofl-1.1",
    "ncsa",
    "unlicense",
    "zlib",
    "pddl",
    "unknown",
    "other",
}
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B"]


def errors_in_card(content: str, kind: str) -> list[str]:
    """Return what is wrong with a card's YAML."""
    block = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if block is None:
        return []  # the Hub warns only
    try:
        values = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(values, dict):
        return ["YAML Metadata Error: it must be a mapping"]
    errors = [
        f'"license" must be one of the known, not {one!r}' for one in _listed(values.get("license")) if one not in LICENCES
    ]
    for key in ("tags", "source_datasets", "base_model", "datasets"):
        if not all(isinstance(one, str) for one in _listed(values.get(key))):
            errors.append(f'"{key}" must be a list of strings')
    for model in _listed(values.get("base_model")):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
            errors.append(f'"base_model" with value {model!r} is not valid. Use a model id from https://hf.co/models.')
    if kind == "dataset":
        errors += [f'"size_categories" has {one!r}' for one in _listed(values.get("size_categories")) if one not in SIZES]
        errors += _errors_in_configs(values.get("configs", []))
    for model in values.get("model-index", []):
        errors += _errors_in_results(model)
    return errors


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _errors_in_configs(configs: list) -> list[str]:
    names = [one.get("config_name") for one in configs]
    errors = [] if len(set(names)) == len(names) else ['"configs" has a name twice']
    errors += [
        '"configs" needs a config_name and data_files' for one in configs if not {"config_name", "data_files"} <= set(one)
    ]
    return errors + ['"configs" has two defaults'] * (sum(bool(one.get("default")) for one in configs) > 1)


def _errors_in_results(model: dict) -> list[str]:
    """https://github.com/huggingface/hub-docs/blob/main/modelcard.md"""
    if not model.get("name"):
        return ['"model-index[0].name" is required']
    errors = []
    for result in model.get("results", []):
        if not result.get("task", {}).get("type"):
            errors.append('"model-index[0].results[0].task.type" is required')
        if not {"name", "type"} <= set(result.get("dataset", {})):
            errors.append('"model-index[0].results[0].dataset" needs a name and a type')
        if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [{}])):
            errors.append('"model-index[0].results[0].metrics" need a type and a value')
    return errors
