"""The options of a run in the form in which Transformers' `from_pretrained` hands them to our quantizer.

AutoModelForCausalLM.from_pretrained(path, quantization_config=MoestroConfig(ram="48GiB"),
                                     experts_implementation="moestro")
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..planning.option import check_names, shows_options
from ..planning.options import METHOD, Options
from ..planning.policies import policy_name


@register_quantization_config(METHOD)
@shows_options(Options)
class MoestroConfig(Options, QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """The options of `moestro.load` in the form that Transformers' `from_pretrained` takes.

    Args:
        {options}

    Raises:
        RequestError: one line that names the option, the value and what is possible.
    """

    def __init__(self, *, quant_method: str = METHOD, **options: Any) -> None:
        check_names(options, [one.name for one in fields(Options)])
        super().__init__(**options)
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make an equal config, for `config.json`."""
        return {"quant_method": METHOD, **super().to_dict(), "policy": policy_name(self.policy)}

    def __deepcopy__(self, memo: dict[int, Any]) -> MoestroConfig:
        """An equal config with the same policy object: Transformers copies configs, and the user's is to decide."""
        return MoestroConfig(**Options.to_dict(self))
