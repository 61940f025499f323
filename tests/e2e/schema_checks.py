"""Schemathesis on the OpenAPI description of a server in this process."""

from typing import Any

import hypothesis
import schemathesis
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from glmtuner.serving.app import Server, application


def check_description(api: Server, examples: int, seed: int | None = None) -> dict[str, Any]:
    """The document, after `examples` legal and `examples` illegal requests of every operation have passed all checks."""
    submit = api.engine.submit

    def submit_short(*requests: Any) -> None:
        for request in requests:
            request.max_new_tokens = min(request.max_new_tokens, 2)  # a legal request may ask for 16 long answers
        submit(*requests)

    api.engine.submit = submit_short  # type: ignore[method-assign]
    app = application(api, None, None)
    operations, answered = 0, []
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * bool(operation.body)
        for mode in modes:

            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis.settings(
                max_examples=examples, deadline=None, database=None, derandomize=seed is None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            def passes_all_checks(case: Any) -> None:
                response = case.call()
                # how calls and their results follow each other, and how many tokens there are, is more than a schema can say
                unsaid = ("invalid_tools", "context_length_exceeded")
                unfitting = response.status_code == 400 and response.json()["error"]["code"] in unsaid
                case.validate_response(response, excluded_checks=[positive_data_acceptance] if unfitting else [])
                answered.extend([response.status_code] * (case.method == "POST"))

            if seed is not None:
                passes_all_checks = hypothesis.seed(seed)(passes_all_checks)
            passes_all_checks()
            operations += 1
    assert operations == 6  # five, one of them with a body
    assert 200 in answered  # among the requests for an answer
    document: dict[str, Any] = TestClient(app).get("/openapi.json").json()
    return document
