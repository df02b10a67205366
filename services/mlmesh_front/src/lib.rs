//! gRPC over HTTP/2 whose bytes move without the interpreter's lock; Python sees bursts of calls.
//!
//! `Front` is what Python holds: it is served from a thread of its own (`serve`), and both meet in `hub`.

mod hub;
mod meter;
mod python;
mod serve;
mod split;
mod wire;

use pyo3::prelude::*;

#[pymodule]
fn mlmesh_front(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<python::Front>()?;
    module.add_class::<python::Call>()?;
    module.add_class::<python::DirectCall>()?;
    module.add_function(wrap_pyfunction!(split::split, module)?)?;
    module.add("BUCKETS", hub::BUCKETS.to_vec())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
