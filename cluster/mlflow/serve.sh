#!/bin/sh
# Starts the server. What holds the password is written here, inside the container: it is in no file of the repository.
set -eu
database="postgresql+psycopg2://mlflow:${POSTGRES_PASSWORD}@database:5432/mlflow"
umask 077
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = READ
database_uri = $database
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Without a cache, each call takes a second.
auth_cache_ttl_seconds = 60
END
export MLFLOW_BACKEND_STORE_URI="$database"
exec mlflow server "$@"
