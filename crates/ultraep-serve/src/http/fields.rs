//! The parameters of a JSON body, taken out one by one: what a parameter should be, and which one is wrong when it is not.
//!
//! Bodies are read through this alone and never through derived `Deserialize`: that takes a list for a struct's fields in
//! their order, and its errors do not say which parameter they are about.

use std::fmt::Display;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object of a client. `null` is as if it were not there.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// The body of a request.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let value = serde_json::from_slice(bytes).map_err(|error| ApiError::malformed(format!("the body: {error}")))?;
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(ApiError::malformed(format!("the body is {}, where a JSON object is expected", kind(&other)))),
        }
    }

    /// A parameter as it came.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// A parameter that is an object itself; an empty one when it is not there.
    pub(super) fn object(&mut self, name: &'static str) -> Result<Self, ApiError> {
        match self.take(name) {
            None => Ok(Self(Map::new())),
            Some(Value::Object(map)) => Ok(Self(map)),
            Some(other) => Err(wrong(name, &other, "an object")),
        }
    }

    /// Whether nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A text.
    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, &other, "a text")),
        }
    }

    /// True or false.
    pub(super) fn flag(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong(name, &other, "true or false")),
        }
    }

    /// A whole number within bounds.
    pub(super) fn whole(&mut self, name: &'static str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let expected = format!("a whole number from {least} to {most}");
        let Some(value) = self.take(name) else { return Ok(None) };
        match whole(&value) {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(wrong(name, &value, expected)),
        }
    }

    /// A number within bounds.
    pub(super) fn number(&mut self, name: &'static str, least: f64, most: f64) -> Result<Option<f64>, ApiError> {
        let expected = format!("a number from {least} to {most}");
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(wrong(name, &value, expected)),
        }
    }
}

/// A whole number; to JSON Schema `3.0` is one, too.
pub(super) fn whole(value: &Value) -> Option<i64> {
    // Up to 2^53 every whole number has a float of its own.
    let float = || value.as_f64().filter(|f| value.is_f64() && f.fract() == 0.0 && f.abs() <= 2f64.powi(53));
    value.as_i64().or_else(|| float().map(|f| f as i64))
}

/// A parameter that is not what is expected.
pub(super) fn wrong(name: &'static str, value: &Value, expected: impl Display) -> ApiError {
    ApiError::invalid(name, format!("{} where {expected} is expected", kind(value)))
}

/// A value in words: numbers as they are, the rest by kind.
pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a text".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}
