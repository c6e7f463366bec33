"""From a request to its answer: schemas, the service, writers of OpenAI's shapes. Knows no Ray and no HTTP."""
