"""The OpenAI-compatible operations, for the document."""

from __future__ import annotations

from api.http.openapi import ANY_MODEL, JSON, Operation, errors, ok
from api.openai.images import ImageEvent, ImageGenerationRequest, ImagesResponse, StepEvent
from api.openai.requests import ChatRequest, CompletionRequest
from api.openai.responses import ChatCompletion, ChatCompletionChunk, Completion, Model, ModelList
from runners.contracts.errors import ContentFiltered, ModelNotServed

OPERATIONS = [
    Operation(
        "post",
        "/v1/completions",
        "completions",
        "Continue prompts, as OpenAI's completions API.",
        ok({JSON: Completion}, events=Completion, end="[DONE]") | errors(*ANY_MODEL),
        body={JSON: CompletionRequest},
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "chat_completions",
        "Generate the next turn of a conversation, as OpenAI's chat API.",
        ok({JSON: ChatCompletion}, events=ChatCompletionChunk, end="[DONE]") | errors(*ANY_MODEL),
        body={JSON: ChatRequest},
    ),
    Operation(
        "post",
        "/v1/images/generations",
        "images",
        "Generate images from a prompt, as OpenAI's images API.",
        ok({JSON: ImagesResponse}, events=StepEvent | ImageEvent)
        | errors(*ANY_MODEL, ContentFiltered),
        body={JSON: ImageGenerationRequest},
    ),
    Operation(
        "get", "/v1/models", "list_models", "The served models.", ok({JSON: ModelList}) | errors()
    ),
    Operation(
        "get",
        "/v1/models/{model_id}",
        "retrieve_model",
        "One of the served models.",
        ok({JSON: Model}) | errors(ModelNotServed),
    ),
]
