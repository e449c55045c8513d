"""Text, chats and rankings on their way to batches."""
