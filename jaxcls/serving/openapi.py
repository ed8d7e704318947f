"""The interface of the server as an OpenAPI 3.1 document."""

from typing import Any

from jaxcls.serving import Settings

_IMAGE = {'schema': {'type': 'string', 'format': 'binary'}}
_BODY = {
    'required': True,
    'content': {
        'image/*': _IMAGE,
        'application/octet-stream': _IMAGE,
        'multipart/form-data': {
            'schema': {
                'type': 'object',
                'properties': {'file': {'type': 'string', 'format': 'binary'}},
                'required': ['file'],
            }
        },
    },
}
_ERROR = {
    'type': 'object',
    'properties': {'error': {'type': 'string'}},
    'required': ['error'],
    'additionalProperties': False,
}
_ERRORS = {
    400: 'A damaged form, a bad query or Host',
    403: "Another site's page",
    408: 'The body came too slowly',
    413: 'Too many bytes or pixels',
    415: 'Neither an image nor a form',
    422: 'No image that can be decoded',
    503: 'Busy: try again after Retry-After seconds',
}


def describe(class_names: tuple[str, ...], settings: Settings) -> dict[str, Any]:
    """The document of a server whose run has these classes."""
    errors = {str(status): _refusal(status) for status in _ERRORS}
    classes = len(class_names)
    prediction = {
        'type': 'object',
        'properties': {
            'class': {'type': 'string'},
            'probability': {'type': 'number', 'minimum': 0, 'maximum': 1},
        },
        'required': ['class', 'probability'],
        'additionalProperties': False,
    }
    predictions = {
        'type': 'object',
        'properties': {'predictions': {'type': 'array', 'items': prediction, 'maxItems': classes}},
        'required': ['predictions'],
        'additionalProperties': False,
    }
    limits = f'At most {settings.max_body:,} bytes and {settings.max_pixels:,} pixels.'
    return {
        'openapi': '3.1.0',
        'info': {'title': 'jaxcls', 'version': '1'},
        'paths': {
            '/predict': {
                'post': {
                    'summary': 'The most probable classes of an image',
                    'description': limits,
                    'parameters': [_query('top', 'how many classes', 1, classes)],
                    'requestBody': _BODY,
                    'responses': {'200': _json('Most probable first', predictions), **errors},
                }
            },
            '/explain': {
                'post': {
                    'summary': 'Where in the image a class is seen',
                    'description': limits,
                    'parameters': [
                        _query(
                            'label', 'of the class; the predicted one if left out', 0, classes - 1
                        )
                    ],
                    'requestBody': _BODY,
                    'responses': {
                        '200': {
                            'description': 'A heat map over it',
                            'content': {'image/png': _IMAGE},
                        },
                        **errors,
                    },
                }
            },
            '/healthz': {
                'get': _get('Whether it is ready', 'application/json', {'type': 'object'})
            },
            '/metrics': {'get': _get('For Prometheus', 'text/plain', {'type': 'string'})},
        },
        'components': {'schemas': {'Error': _ERROR}},
    }


def _query(name: str, description: str, low: int, high: int) -> dict[str, Any]:
    schema = {'type': 'integer', 'minimum': low, 'maximum': high}
    return {'name': name, 'in': 'query', 'description': description, 'schema': schema}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {'description': description, 'content': {'application/json': {'schema': schema}}}


def _refusal(status: int) -> dict[str, Any]:
    found = _json(_ERRORS[status], {'$ref': '#/components/schemas/Error'})
    if status == 503:
        found['headers'] = {'Retry-After': {'schema': {'type': 'integer'}}}
    return found


def _get(summary: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {kind: {'schema': schema}}
    return {'summary': summary, 'responses': {'200': {'description': summary, 'content': content}}}
