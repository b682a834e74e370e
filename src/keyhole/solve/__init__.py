"""The engine: one loop, lifted over trials. No attack, defense or metric knows that it exists."""
