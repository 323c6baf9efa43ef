//! The crate ttrpc, as client and as server, on a runtime of one thread.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::{Builder, Runtime};
use ttrpc::r#async::{Client, MethodHandler, Server, Service, TtrpcContext};
use ttrpc::{Code, Request, Response, get_status};

use crate::check::{Asked, Caller, Outcome, unwrap, wrap};
use crate::{Failure, SERVICE, bench};

fn runtime() -> Result<Runtime, Failure> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn request(service: &str, method: &str, payload: Vec<u8>) -> Request {
    Request { service: service.into(), method: method.into(), payload, ..Request::default() }
}

struct Connected {
    runtime: Runtime,
    client: Client,
}

impl Connected {
    fn connect(path: &str) -> Result<Self, Failure> {
        let runtime = runtime()?;
        let client = runtime.block_on(Client::connect(&format!("unix://{path}")))?;
        Ok(Self { runtime, client })
    }

    /// All at once, outcomes in order.
    fn all(&self, requests: Vec<Request>) -> Vec<ttrpc::Result<Response>> {
        self.runtime.block_on(async {
            let started: Vec<_> = requests
                .into_iter()
                .map(|request| {
                    let client = self.client.clone();
                    tokio::spawn(async move { client.request(request).await })
                })
                .collect();
            let mut outcomes = Vec::with_capacity(started.len());
            for one in started {
                outcomes.push(one.await.unwrap_or_else(|error| Err(ttrpc::Error::Others(error.to_string()))));
            }
            outcomes
        })
    }
}

/// The client under measurement.
pub struct Bench(Connected);

impl Bench {
    /// Connects.
    pub fn connect(path: &str) -> Result<Self, Failure> {
        Connected::connect(path).map(Self)
    }
}

impl bench::Client for Bench {
    fn calls(&mut self, window: usize, size: usize) -> Result<(), Failure> {
        let answers = if window == 1 {
            vec![self.0.runtime.block_on(self.0.client.request(request("s", "m", vec![7; size])))]
        } else {
            self.0.all((0..window).map(|_| request("s", "m", vec![7; size])).collect())
        };
        for answer in answers {
            let got = answer?.payload.len();
            if got != size {
                return Err(format!("{got} bytes came back of {size}").into());
            }
        }
        Ok(())
    }
}

/// The client under test.
pub struct Check(Connected);

impl Check {
    /// Connects.
    pub fn connect(path: &str) -> Result<Self, Failure> {
        Connected::connect(path).map(Self)
    }
}

impl Caller for Check {
    fn call(
        &mut self,
        asked: Vec<Asked<'_>>,
        timeout: Option<Duration>,
        metadata: &[(String, String)],
    ) -> Result<Vec<Outcome>, Failure> {
        let pairs = metadata.iter().map(|(key, value)| {
            let mut pair = ttrpc::proto::KeyValue::default();
            pair.key = key.clone();
            pair.value = value.clone();
            pair
        });
        let pairs: Vec<_> = pairs.collect();
        let requests = asked.into_iter().map(|(service, method, value)| {
            let mut request = request(service, method, wrap(&value));
            request.timeout_nano = timeout.map_or(0, |timeout| timeout.as_nanos() as i64);
            request.metadata = pairs.clone();
            request
        });
        let outcome = |answer: ttrpc::Result<Response>| match answer {
            Ok(answer) => Ok(Outcome { value: unwrap(&answer.payload), ..Outcome::default() }),
            Err(ttrpc::Error::RpcStatus(status)) => {
                Ok(Outcome { code: status.code.value(), text: status.message, value: Vec::new() })
            }
            // The crate tells a time that ran out in words alone.
            Err(error) if error.to_string().contains("timeout") => {
                Ok(Outcome { code: Code::DEADLINE_EXCEEDED as i32, ..Outcome::default() })
            }
            Err(error) => Err(error.into()),
        };
        self.0.all(requests.collect()).into_iter().map(outcome).collect()
    }
}

struct Method(&'static str);

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let mut response = Response::default();
        match self.0 {
            "Echo" => response.payload = request.payload,
            "Fail" => {
                let text = String::from_utf8_lossy(&unwrap(&request.payload)).into_owned();
                let asked = crate::serve_ours::status_of(&text);
                let mut status = get_status(Code::UNKNOWN, asked.message);
                status.code = protobuf::EnumOrUnknown::from_i32(asked.code);
                response.set_status(status);
            }
            "Slow" => tokio::time::sleep(Duration::from_secs(10)).await,
            _ => {
                let values = context.metadata.get("trace").cloned().unwrap_or_default();
                response.payload = wrap(values.join(",").as_bytes());
            }
        }
        Ok(response)
    }
}

/// Serves for ever.
pub fn serve(path: &str) -> Result<(), Failure> {
    let methods = ["Echo", "Fail", "Slow", "Metadata"]
        .map(|name| (name.to_owned(), Box::new(Method(name)) as Box<dyn MethodHandler + Send + Sync>));
    let service = Service { methods: HashMap::from(methods), streams: HashMap::new() };
    runtime()?.block_on(async {
        let mut server = Server::new()
            .bind(&format!("unix://{path}"))?
            .register_service(HashMap::from([(SERVICE.to_owned(), service)]));
        server.start().await?;
        println!("ready");
        std::future::pending::<()>().await;
        Ok(())
    })
}
