"""The core types. Reading this folder is reading the design; it imports torch and nothing else of ours."""
