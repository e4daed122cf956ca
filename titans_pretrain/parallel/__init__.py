# names the environment variable with the socket a launcher on this machine listens at for rank 0
LISTENER = "TITANS_LISTENER"
