//! Parquet files taken as hostile: what the library trusts is compared with limits first.
//!
//! A column chunk says in the footer how large it is; a page says how many values it has, and a run of equal values costs a few
//! bytes whatever its length. So chunks that claim over [`MAX_CHUNK_BYTES`] are refused before a page is read, and pages that
//! together claim more values than their chunk may have are refused before they are expanded.

use std::fs::File;

use parquet::basic::Compression;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::DataType;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::Problem;

/// Largest column chunk, expanded, in bytes.
const MAX_CHUNK_BYTES: i64 = 1 << 30;
/// Most values of a column chunk.
pub(crate) const MAX_CHUNK_VALUES: u64 = 1 << 26;

/// The library is meant to return errors on bad files; where it panics after all, that is an error too.
pub(crate) fn guarded<T>(read: impl FnOnce() -> Result<T>) -> std::result::Result<T, Problem> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|error| Problem::syntax(error.to_string().replace('\n', " "))),
        Err(_) => Err(Problem::Syntax("the parquet file is damaged".to_owned())),
    }
}

/// Whether a chunk has a codec that is built in and a size that may be.
pub(crate) fn check_chunk(chunk: &ColumnChunkMetaData, file_bytes: u64) -> std::result::Result<(), Problem> {
    match chunk.compression() {
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) => {}
        other => {
            let codec = format!("codec {other}: allowed are none, snappy and gzip; write it anew with one of them");
            return Err(Problem::Unsupported(codec));
        }
    }
    let (packed, expanded) = (chunk.compressed_size(), chunk.uncompressed_size());
    if u64::try_from(packed).is_ok_and(|packed| packed <= file_bytes) && (0..=MAX_CHUNK_BYTES).contains(&expanded) {
        return Ok(());
    }
    let got = format!("{packed}, {expanded} expanded");
    Err(Problem::differs("bytes of a column chunk:", got, format!("within the file and {MAX_CHUNK_BYTES}")))
}

/// Reads a column of a row group, at most `max_values` of it. The caller has checked the column's type.
pub(crate) fn column<T: DataType>(
    file: &SerializedFileReader<File>,
    (group, column): (usize, usize),
    max_values: u64,
) -> std::result::Result<ColumnReaderImpl<T>, Problem> {
    guarded(|| {
        let pages = file.get_row_group(group)?.get_column_page_reader(column)?;
        let description = file.metadata().file_metadata().schema_descr().column(column);
        Ok(ColumnReaderImpl::new(description, Box::new(LimitedPages { pages, left: max_values })))
    })
}

/// Pages up to a number of values.
struct LimitedPages {
    pages: Box<dyn PageReader>,
    left: u64,
}

impl PageReader for LimitedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = page.as_ref().filter(|page| page.is_data_page()) {
            let claimed = u64::from(page.num_values());
            self.left = self.left.checked_sub(claimed).ok_or_else(|| {
                ParquetError::General(format!("a page of {claimed} values: allowed are up to {} more", self.left))
            })?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}

impl Iterator for LimitedPages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}
