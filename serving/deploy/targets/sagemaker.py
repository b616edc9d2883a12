"""Amazon SageMaker: an image that keeps to its contract, and a CloudFormation stack with alarms that undo an update."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from serving.deploy import scaling
from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.targets import docker
from serving.deploy.yaml_text import yaml_text

CONTEXT = "image"
PORT = 8080
"""Of SageMaker's contract, with the paths below."""
ALIASES = {"/ping": "/ready", "/invocations": "/predict"}
VARIANT = "main"
CANARY_PER_CENT, CANARY_SECONDS = 10, 600


def render(facts: Facts, options: Options) -> dict[str, str]:
    """The build context and stack.yaml."""
    options = dataclasses.replace(options, port=PORT)
    extra = "COPY --chmod=0755 serve /usr/local/bin/serve\n"
    # Without an entry point: SageMaker gives the one argument `serve`, which is then a program.
    context = docker.image(facts, options, 'CMD ["serve"]', extra, health="/ping")
    context["serve"] = docker.filled(
        (docker.FILES / "serve").read_text(encoding="utf-8"), {"options": json.dumps(_server_options(options))}
    )
    about = (
        f"Serves {facts.name} {facts.version} on SageMaker. The bundle is in the image.\n"
        f"{scaling.why_target(facts, options)}\n\n"
        f"  build    docker build -t {options.image} image, and push it to ECR\n"
        f"  apply    aws cloudformation deploy --stack-name {facts.label} --template-file stack.yaml \\\n"
        "             --parameter-overrides Image=ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG Role=ARN\n"
        f"  try      aws sagemaker-runtime invoke-endpoint --endpoint-name {facts.label} \\\n"
        "             --content-type application/json --body fileb://request.json /dev/stdout\n\n"
        f"An update sends {CANARY_PER_CENT} % of the traffic to the new version for {CANARY_SECONDS} s, and goes back\n"
        "by itself when an alarm below is raised."
    )
    files = {f"{CONTEXT}/{path}": text for path, text in context.items()}
    return {"stack.yaml": yaml_text(about, _stack(facts, options)), **files}


def _server_options(options: Options) -> list[str]:
    arguments = options.arguments()
    given = arguments[arguments.index("--workers") :]
    for path, ours in ALIASES.items():
        given += ["--alias", f"{path}={ours}"]
    return given


def _stack(facts: Facts, options: Options) -> dict[str, Any]:
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"Serves {facts.name} {facts.version}",
        "Parameters": {
            "Image": {"Type": "String", "Description": "The image in ECR, best by digest"},
            "Role": {"Type": "String", "Description": "ARN of the role that SageMaker pulls the image with"},
            "EndpointName": {"Type": "String", "Default": facts.label},
            "InstanceType": {"Type": "String", "Default": "ml.g5.xlarge" if options.gpus else "ml.c5.large"},
        },
        "Resources": {
            **_endpoint(facts, options),
            **_autoscaling(facts, options),
            **_alarms(options),
        },
        "Outputs": {"Endpoint": {"Value": {"Ref": "Endpoint"}}},
    }


def _endpoint(facts: Facts, options: Options) -> dict[str, Any]:
    variant = {
        "VariantName": VARIANT,
        "ModelName": {"Fn::GetAtt": ["Model", "ModelName"]},
        "InstanceType": {"Ref": "InstanceType"},
        "InitialInstanceCount": options.replicas,
        "InitialVariantWeight": 1,
        "ContainerStartupHealthCheckTimeoutInSeconds": facts.starts_within,
    }
    tags = [{"Key": "model", "Value": facts.name}, {"Key": "version", "Value": facts.version}]
    return {
        "Model": {
            "Type": "AWS::SageMaker::Model",
            "Properties": {
                "ExecutionRoleArn": {"Ref": "Role"},
                # The server reaches nothing; it needs no network of its own.
                "EnableNetworkIsolation": True,
                "PrimaryContainer": {"Image": {"Ref": "Image"}},
                "Tags": tags,
            },
        },
        "Config": {
            "Type": "AWS::SageMaker::EndpointConfig",
            "Properties": {"ProductionVariants": [variant], "Tags": tags},
        },
        "Endpoint": {
            "Type": "AWS::SageMaker::Endpoint",
            "Properties": {
                "EndpointName": {"Ref": "EndpointName"},
                "EndpointConfigName": {"Fn::GetAtt": ["Config", "EndpointConfigName"]},
                "DeploymentConfig": {
                    "BlueGreenUpdatePolicy": {
                        "TrafficRoutingConfiguration": {
                            "Type": "CANARY",
                            "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": CANARY_PER_CENT},
                            "WaitIntervalInSeconds": CANARY_SECONDS,
                        },
                        "TerminationWaitInSeconds": 120,
                        "MaximumExecutionTimeoutInSeconds": 3600,
                    },
                    "AutoRollbackConfiguration": {
                        "Alarms": [{"AlarmName": {"Ref": "Errors"}}, {"AlarmName": {"Ref": "Slow"}}]
                    },
                },
                "Tags": tags,
            },
        },
    }


def _autoscaling(facts: Facts, options: Options) -> dict[str, Any]:
    """On concurrent requests of an instance: what the capacity card calls requests in flight."""
    metric = "SageMakerVariantConcurrentRequestsPerModelHighResolution"
    return {
        "Instances": {
            "Type": "AWS::ApplicationAutoScaling::ScalableTarget",
            "Properties": {
                "ServiceNamespace": "sagemaker",
                "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
                "ResourceId": {"Fn::Sub": f"endpoint/${{Endpoint.EndpointName}}/variant/{VARIANT}"},
                "MinCapacity": options.replicas,
                "MaxCapacity": options.max_replicas,
            },
        },
        "Scaling": {
            "Type": "AWS::ApplicationAutoScaling::ScalingPolicy",
            "Properties": {
                "PolicyName": f"{facts.label}-in-flight",
                "PolicyType": "TargetTrackingScaling",
                "ScalingTargetId": {"Ref": "Instances"},
                "TargetTrackingScalingPolicyConfiguration": {
                    "TargetValue": scaling.in_flight_target(facts, options),
                    "PredefinedMetricSpecification": {"PredefinedMetricType": metric},
                    "ScaleInCooldown": 300,
                    "ScaleOutCooldown": 30,
                },
            },
        },
    }


def _alarms(options: Options) -> dict[str, Any]:
    shared = {"ComparisonOperator": "GreaterThanThreshold", "EvaluationPeriods": 2, "TreatMissingData": "notBreaching"}
    return {
        "Errors": {
            "Type": "AWS::CloudWatch::Alarm",
            "Properties": {
                "AlarmDescription": "Share of requests that were answered with 5xx",
                **shared,
                "Threshold": options.max_errors,
                "Metrics": [
                    {"Id": "share", "Expression": "failed / requests", "ReturnData": True},
                    _metric("failed", "Invocation5XXErrors"),
                    _metric("requests", "Invocations"),
                ],
            },
        },
        "Slow": {
            "Type": "AWS::CloudWatch::Alarm",
            "Properties": {
                "AlarmDescription": "p95 of the model's latency, in microseconds",
                **shared,
                "Namespace": "AWS/SageMaker",
                "MetricName": "ModelLatency",
                "Dimensions": _dimensions(),
                "ExtendedStatistic": "p95",
                "Period": 60,
                "Threshold": options.p95_ms * 1000,
            },
        },
    }


def _metric(name: str, metric: str) -> dict[str, Any]:
    found = {"Namespace": "AWS/SageMaker", "MetricName": metric, "Dimensions": _dimensions()}
    return {"Id": name, "ReturnData": False, "MetricStat": {"Metric": found, "Period": 60, "Stat": "Sum"}}


def _dimensions() -> list[dict[str, Any]]:
    return [
        {"Name": "EndpointName", "Value": {"Ref": "EndpointName"}},
        {"Name": "VariantName", "Value": VARIANT},
    ]
