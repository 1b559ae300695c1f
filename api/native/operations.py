"""The native operations and those of jobs, for the document.

BentoML serves jobs; what it answers on `/status`, `/submit` and `/retry` is described here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from api.http.openapi import ANY_BODY, ANY_MODEL, JSON, Operation, errors, ok
from api.native.images import GenerateImageRequest, GenerateImageResponse
from api.native.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    GenerateRequest,
    GenerateResponse,
    StreamFrame,
    StreamRequest,
    StreamTotals,
    TokenizeRequest,
    TokenizeResponse,
)
from runners.contracts.errors import ContentFiltered, InvalidRequest, ModelNotServed

TASK_ROUTE = "/generate_image_task"
"""The path of the jobs' routes."""


class JobState(BaseModel):
    """How far a job is."""

    task_id: str
    status: Literal["pending", "in_progress", "completed", "failed"]
    created_at: str
    """In ISO 8601."""
    executed_at: str | None


class SubmittedJob(BaseModel):
    """A new job."""

    task_id: str
    """By which its state and its result are fetched."""
    status: Literal["in_progress"]


_IMAGES = {
    "image/png": bytes,
    "image/jpeg": bytes,
    "image/webp": bytes,
    JSON: GenerateImageResponse,
}
_IMAGE_ANSWERS = ok(
    _IMAGES, headers={"X-Seed": "The seed that generates the image again."}
) | errors(*ANY_MODEL, ContentFiltered)
_BODY = {JSON: GenerateImageRequest}
_JOB = {"task_id": "The id that `/submit` returned."}

OPERATIONS = [
    Operation(
        "post",
        "/generate",
        "generate",
        "Continue one prompt or several.",
        ok({JSON: GenerateResponse}) | errors(*ANY_MODEL),
        body={JSON: GenerateRequest},
    ),
    Operation(
        "post",
        "/generate_stream",
        "generate_stream",
        "Continue one prompt and send the text as it grows, as server-sent events.",
        ok({}, events=StreamFrame | StreamTotals) | errors(*ANY_MODEL),
        body={JSON: StreamRequest},
    ),
    Operation(
        "post",
        "/tokenize",
        "tokenize",
        "Token ids of a text or a conversation.",
        ok({JSON: TokenizeResponse}) | errors(*ANY_MODEL),
        body={JSON: TokenizeRequest},
    ),
    Operation(
        "post",
        "/detokenize",
        "detokenize",
        "The text of token ids.",
        ok({JSON: DetokenizeResponse}) | errors(*ANY_MODEL),
        body={JSON: DetokenizeRequest},
    ),
    Operation(
        "post",
        "/generate_image",
        "generate_image",
        "Generate images from a prompt; returns one image as its file, several as JSON.",
        _IMAGE_ANSWERS,
        body=_BODY,
    ),
    Operation(
        "post",
        TASK_ROUTE,
        "generate_image_task",
        "As `/generate_image`, within the time limit of a job.",
        _IMAGE_ANSWERS,
        body=_BODY,
    ),
    Operation(
        "post",
        f"{TASK_ROUTE}/submit",
        "generate_image_task_submit",
        "Start a job, which outlasts the connection.",
        ok({JSON: SubmittedJob}) | errors(*ANY_MODEL),
        body=_BODY,
    ),
    Operation(
        "get",
        f"{TASK_ROUTE}/status",
        "generate_image_task_status",
        "How far a job is.",
        ok({JSON: JobState}) | errors(InvalidRequest, ModelNotServed),
        query=_JOB,
    ),
    Operation(
        "get",
        f"{TASK_ROUTE}/get",
        "generate_image_task_get",
        "The answer of a job that is done, with its own status; 400 before that.",
        _IMAGE_ANSWERS,
        query=_JOB,
    ),
    Operation(
        "post",
        f"{TASK_ROUTE}/retry",
        "generate_image_task_retry",
        "Start a job that is done once more, as a new one.",
        ok({JSON: SubmittedJob}) | errors(*ANY_MODEL),
        query=_JOB,
    ),
    Operation(
        "put",
        f"{TASK_ROUTE}/cancel",
        "generate_image_task_cancel",
        "Always refused: jobs cannot be cancelled.",
        errors(*ANY_BODY),
        query=_JOB,
    ),
]
