#!/usr/bin/env bash
# Submits one config to Kubeflow Pipelines and waits for the verdict, which it leaves in summary.md.
#
# No keys: this job proves who it is by OIDC, to AWS (AWS_ROLE_ARN) and to the gateway in front of KFP. Such tokens live
# for minutes and a training for hours, so they are fetched anew before every stretch of waiting.
#
# Read from the environment: CONFIG, PROFILE, OVERRIDES, RUN_ID, RFDETR_ROOT, KF_PIPELINES_ENDPOINT, KFP_AUDIENCE,
# IMAGE_DIGESTS; WAIT_MINUTES (330: a hosted job ends after 360), STRETCH_MINUTES (4), POLL_SECONDS (15).
set -euo pipefail

token() { # AUDIENCE: a fresh token of this job for it
  curl --fail --silent --show-error --max-time 30 --retry 3 \
    --header "Authorization: bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=$1" |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["value"])'
}

log_in() {
  token sts.amazonaws.com > "$AWS_WEB_IDENTITY_TOKEN_FILE"
  RFDETR_KFP_TOKEN=$(token "$KFP_AUDIENCE")
  export RFDETR_KFP_TOKEN
  echo "::add-mask::$RFDETR_KFP_TOKEN"
}

export AWS_WEB_IDENTITY_TOKEN_FILE=${AWS_WEB_IDENTITY_TOKEN_FILE:-$RUNNER_TEMP/aws-token}
export AWS_ROLE_SESSION_NAME=refresh-model
umask 077
log_in
python -m pipelines submit --config "$CONFIG" --profile "$PROFILE" --overrides "${OVERRIDES:-}" \
  ${RUN_ID:+--run-id "$RUN_ID"} --digests "$IMAGE_DIGESTS" --if-changed --output run.json --summary summary.md
run=$(python3 -c 'import json; print(json.load(open("run.json"))["kfp_run_id"] or "")')
[ -n "$run" ] || exit 0

code=124
deadline=$((SECONDS + ${WAIT_MINUTES:-330} * 60))
while [ "$code" = 124 ] && [ "$SECONDS" -lt "$deadline" ]; do
  code=0
  python -m pipelines wait "$run" --timeout "${STRETCH_MINUTES:-4}" --poll "${POLL_SECONDS:-15}" --summary summary.md ||
    code=$?
  log_in
done
if [ "$code" = 124 ]; then
  python3 -c 'import json; print("# Still running\n\n" + json.load(open("run.json"))["link"])' > summary.md
  code=0
fi
exit "$code"
