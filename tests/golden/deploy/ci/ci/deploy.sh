#!/bin/sh
# Applies a rendered folder and waits for what comes of it: ci/deploy.sh FOLDER NAME NAMESPACE.
#
# A folder of argo-rollouts: the rollout goes by its steps, its analysis promotes or undoes it; this only watches.
# A folder of kubernetes: the Deployment is rolled out, and undone where it does not get ready.
set -eu
folder=$1 name=$2 namespace=$3
seconds=${DEPLOY_SECONDS:-9000}

kubectl apply --server-side --namespace "$namespace" --kustomize "$folder"

if [ ! -f "$folder/rollout.yaml" ]; then
    if kubectl rollout status --namespace "$namespace" "deployment/$name" --timeout "${seconds}s"; then
        exit 0
    fi
    echo "deploy: $name is not ready after $seconds s: undone" >&2
    kubectl rollout undo --namespace "$namespace" "deployment/$name"
    exit 1
fi

end=$(($(date +%s) + seconds))
while [ "$(date +%s)" -lt "$end" ]; do
    seen=$(kubectl get rollout "$name" --namespace "$namespace" \
        --output 'jsonpath={.metadata.generation} {.status.observedGeneration} {.status.phase} {.status.message}')
    echo "deploy: $seen"
    generation=${seen%% *} rest=${seen#* }
    # Until the controller has seen this version, it tells how the last one went.
    if [ "$generation" = "${rest%% *}" ]; then
        rest=${rest#* }
        case "${rest%% *}" in
            Healthy) exit 0 ;;
            Degraded)
                echo "deploy: $name was undone" >&2
                exit 1
                ;;
        esac
    fi
    sleep 15
done
echo "deploy: $name has no verdict after $seconds s; it is left as it is" >&2
exit 1
